//! File names for snapshots and members.

use std::collections::BTreeMap;

/// Longest file name in bytes that Linux has.
const MAX_NAME: usize = 255;
/// Bytes of an id behind a name at most: it can be as long as its image likes.
const MAX_SUFFIX: usize = 100;

/// `name` as a file name: percent-encoded where a file name can't hold it.
pub fn file_name(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len());
    for (at, c) in name.char_indices() {
        // A leading dot would hide the file, or be one of the names that every directory has.
        if c == '/' || c.is_control() || (at == 0 && c == '.') {
            let bytes = c.to_string().into_bytes();
            encoded.extend(bytes.iter().map(|byte| format!("%{byte:02X}")));
        } else {
            encoded.push(c);
        }
    }
    if encoded.is_empty() {
        return "%".to_owned();
    }
    cut(&encoded, MAX_NAME).to_owned()
}

fn cut(text: &str, len: usize) -> &str {
    &text[..text.floor_char_boundary(len)]
}

/// Adds `value` under `name`, or under `name~suffix` if that is taken.
pub fn insert_unique<T>(map: &mut BTreeMap<String, T>, name: String, suffix: &str, value: T) {
    let suffix = file_name(suffix);
    let suffix = cut(&suffix, MAX_SUFFIX);
    let with = |end: String| format!("{}{end}", cut(&name, MAX_NAME - end.len()));
    // Ids should be unique and sometimes are not; nothing is ever left out.
    let counted = (2_usize..).map(|count| with(format!("~{suffix}~{count}")));
    let mut names = [name.clone(), with(format!("~{suffix}"))].into_iter().chain(counted);
    if let Some(unique) = names.find(|name| !map.contains_key(name)) {
        map.insert(unique, value);
    }
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
            ("\u{1b}[31m\u{7f}\u{9b}31m", "%1B[31m%7F%C2%9B31m"),
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

    #[test]
    fn no_name_is_longer_than_a_file_name_can_be() {
        let long = "ä".repeat(300);
        let mut map = BTreeMap::new();
        for id in ["1", "1", &long, &long] {
            insert_unique(&mut map, file_name(&long), id, ());
        }
        assert_eq!(map.len(), 4);
        assert!(map.keys().all(|name| name.len() <= 255), "{map:?}");
        assert!(map.contains_key(&"ä".repeat(127)));
    }
}
