//! One way through the library, a number of times: what `benches/instructions` counts the instructions of.
//!
//!     work NUMBER COUNT

use std::env;
use std::error::Error;

mod works;

fn main() -> Result<(), Box<dyn Error>> {
    let numbers: Vec<usize> = env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    // cargo runs it, too, with words of its own.
    let [number, count] = numbers[..] else { return Ok(()) };
    let name = works::NAMES.get(number).ok_or("no such work")?;
    let mut work = works::prepare(name)?;
    for number in 0..count as u64 {
        (work.step)(number);
    }
    println!("{}", work.name);
    Ok(())
}
