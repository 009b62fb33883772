//! Sizes as people write and read them.

use crate::error::{Error, Result};

const SUFFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// Bytes from a number with an optional suffix: `b`, `k`, `M`, `G`, `T`, `P`, `E`, each 1024 of the one before.
///
/// # Errors
/// Anything else, `kB` and `KiB` too: people differ on what these are. More than 2^63 bytes, and parts of a byte.
pub fn parse(text: &str) -> Result<u64> {
    let bad = || Error::usage(format!("\"{text}\" is no size: write it like 512, 64k or 1.5G"));
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let power = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        "e" => 6,
        _ => return Err(bad()),
    };
    let unit = 1_u64 << (10 * power);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let is_part_of_a_byte = power == 0 && fraction.bytes().any(|byte| byte != b'0');
    let is_empty = whole.is_empty() && fraction.is_empty();
    if !is_number(whole) || !is_number(fraction) || is_empty || is_part_of_a_byte {
        return Err(bad());
    }
    // The zeroes keep either part from being empty.
    let number = |text: String| text.parse::<u64>().ok();
    let whole = number(format!("0{whole}")).and_then(|whole| whole.checked_mul(unit));
    let whole_bytes = whole.ok_or_else(bad)?;
    let share: f64 = format!("0.{fraction}0").parse().map_err(|_| bad())?;
    let fraction_bytes = (share * unit as f64) as u64;
    let bytes = whole_bytes.checked_add(fraction_bytes).ok_or_else(bad)?;
    i64::try_from(bytes).map(i64::cast_unsigned).map_err(|_| bad())
}

/// `bytes` with three significant digits and the unit in which they are below 1000: "388 KiB".
pub fn human(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut suffixes = SUFFIXES.iter();
    let mut suffix = suffixes.next().copied().unwrap_or_default();
    while value >= 1000.0 {
        let Some(next) = suffixes.next() else { break };
        (value, suffix) = (value / 1024.0, next);
    }
    format!("{} {suffix}B", three_digits(value))
}

/// `value`, which is 0 or between 0.1 and 1024, as C's `%.3g` shows it.
fn three_digits(value: f64) -> String {
    // The exponent counts after rounding.
    let rounded = format!("{value:.2e}");
    let (digits, exponent) = rounded.split_once('e').unwrap_or((&rounded, "0"));
    let shorten = |digits: &str| digits.trim_end_matches('0').trim_end_matches('.').to_owned();
    match exponent.parse::<i32>() {
        Ok(exponent @ -1..=1) => shorten(&format!("{value:.*}", (2 - exponent) as usize)),
        Ok(3..) => format!("{}e+{exponent:0>2}", shorten(digits)),
        _ => format!("{value:.0}"),
    }
}

/// As C prints it: no prefix before a lone zero.
pub fn hexadecimal(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        assert_eq!(parse("512").unwrap(), 512);
        assert_eq!(parse("64k").unwrap(), 65536);
        assert_eq!(parse("1.5G").unwrap(), 3 << 29);
        assert_eq!(parse("100M").unwrap(), 100 << 20);
        assert_eq!(parse(".5M").unwrap(), 512 << 10);
        assert_eq!(parse("5.").unwrap(), 5);
        for bad in [
            "", "k", ".", ".M", "1x", "-1", "+1", "1.x", "16E", "1e3", "1.5", "0.5b", "1kB",
            "1MiB", "1.+5k",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_shown_as_qemu_img_shows_them() {
        for (bytes, shown) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (397_312, "388 KiB"),
            (104_857_600, "100 MiB"),
            (3 << 29, "1.5 GiB"),
            (328_192, "320 KiB"),
            (1_063_256_064, "0.99 GiB"),
            (1_000_448, "977 KiB"),
            (1_022_976, "999 KiB"),
            (1_023_488, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_048_064, "1 MiB"),
            (1_048_570_368, "1e+03 MiB"),
            // Halves go to the even neighbour.
            (1_179_648, "1.12 MiB"),
            (10_747_904, "10.2 MiB"),
            (105_381_888, "100 MiB"),
            (106_430_464, "102 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human(bytes), shown, "{bytes}");
        }
    }
}
