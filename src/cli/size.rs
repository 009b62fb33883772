//! Sizes as people write and read them.

use crate::error::{Error, Result};

const SUFFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// Bytes from a number with an optional suffix: `b`, `k`, `M`, `G`, `T`, `P`, `E`, each 1024 of the one before.
///
/// # Errors
/// Anything else, and more than 2^63 bytes.
pub fn parse(text: &str) -> Result<u64> {
    let bad = || Error::usage(format!("\"{text}\" is no size: write it like 512, 64k or 1.5G"));
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let power = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" | "kb" => 1,
        "m" | "mib" | "mb" => 2,
        "g" | "gib" | "gb" => 3,
        "t" | "tib" | "tb" => 4,
        "p" | "pib" | "pb" => 5,
        "e" | "eib" | "eb" => 6,
        _ => return Err(bad()),
    };
    let unit = 1_u64 << (10 * power);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let whole_bytes =
        whole.parse::<u64>().ok().and_then(|whole| whole.checked_mul(unit)).ok_or_else(bad)?;
    let fraction_bytes = if fraction.is_empty() {
        0
    } else {
        let share: f64 = format!("0.{fraction}").parse().map_err(|_| bad())?;
        (share * unit as f64) as u64
    };
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
    let decimals = match value {
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    let mut digits = format!("{value:.decimals$}");
    if digits.contains('.') {
        digits = digits.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    format!("{digits} {suffix}B")
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
        for bad in ["", "k", "1x", "-1", "1.x", "16E", "1e3"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_shown_as_qemu_img_shows_them() {
        for (bytes, shown) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.98 KiB"),
            (397_312, "388 KiB"),
            (104_857_600, "100 MiB"),
            (3 << 29, "1.5 GiB"),
            (328_192, "320 KiB"),
            (1_063_256_064, "0.99 GiB"),
        ] {
            assert_eq!(human(bytes), shown);
        }
    }
}
