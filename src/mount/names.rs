//! File names for snapshots and members.

use std::collections::BTreeMap;

/// Longest file name in bytes that Linux has, less room for `~ID`.
const MAX_NAME: usize = 230;

/// `name` as a file name: percent-encoded where a file name can't hold it.
pub fn file_name(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len());
    for (at, c) in name.char_indices() {
        // A leading dot would hide the file, or be one of the names that every directory has.
        if c == '/' || c.is_ascii_control() || (at == 0 && c == '.') {
            encoded.push_str(&format!("%{:02X}", c as u32));
        } else {
            encoded.push(c);
        }
    }
    if encoded.is_empty() {
        return "%".to_owned();
    }
    encoded.truncate(encoded.floor_char_boundary(MAX_NAME));
    encoded
}

/// Adds `value` under `name`, or under `name~suffix` if that is taken.
pub fn insert_unique<T>(map: &mut BTreeMap<String, T>, name: String, suffix: &str, value: T) {
    let mut unique = name.clone();
    if map.contains_key(&unique) {
        unique = format!("{name}~{}", file_name(suffix));
    }
    // Ids should be unique and sometimes are not; nothing is ever left out.
    let mut count = 2;
    while map.contains_key(&unique) {
        unique = format!("{name}~{}~{count}", file_name(suffix));
        count += 1;
    }
    map.insert(unique, value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_file_name_can_not_hold_is_encoded() {
        for (name, expected) in [
            ("before upgrade", "before upgrade"),
            ("a/b", "a%2Fb"),
            (".hidden", "%2Ehidden"),
            ("..", "%2E."),
            ("two\nlines", "two%0Alines"),
            ("Ünï 100%", "Ünï 100%"),
            ("", "%"),
        ] {
            assert_eq!(file_name(name), expected);
        }
    }

    #[test]
    fn a_name_that_is_taken_gets_the_id_behind_it() {
        let mut map = BTreeMap::new();
        for id in ["1", "2", "2"] {
            insert_unique(&mut map, "one".into(), id, id);
        }
        assert_eq!(map.keys().collect::<Vec<_>>(), ["one", "one~2", "one~2~2"]);
    }
}
