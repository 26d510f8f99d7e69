//! The text of a network configuration list: our entry put in and taken out, and every
//! other byte left as it is.

use std::ops::Range;

use rscni_types::version::{PluginInfo, SpecVersion};
use serde::Deserialize;
use serde_json::{Value, value::RawValue};

/// The plugin's type: its program's name.
pub(super) const TYPE: &str = "interceptor-cni";

#[derive(Deserialize)]
struct List<'a> {
    #[serde(rename = "cniVersion")]
    version: SpecVersion,
    #[serde(borrow)]
    plugins: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
struct Plugin {
    #[serde(rename = "type")]
    kind: String,
}

/// A plugin of the list, and where it stands in the text.
struct Place<'a> {
    plugin: &'a str,
    range: Range<usize>,
    ours: bool,
}

/// The list with our entry, after all others if there was none; `None` if it has it
/// already.
///
/// # Errors
///
/// If it isn't a list of plugins to which ours can be added: the text says why.
pub(super) fn with_entry(text: &str, entry: &Value) -> Result<Option<String>, String> {
    let list: List<'_> = parse(text)?;
    PluginInfo::default()
        .validate(list.version)
        .map_err(|error| format!("its version of CNI won't do: {}", error.details()))?;
    let places = places(text, &list)?;
    let present = places.iter().position(|place| place.ours);
    let same = present.is_some_and(|index| {
        // Before it there is one to chain to.
        index > 0
            && places.iter().filter(|place| place.ours).count() == 1
            && serde_json::from_str::<Value>(places[index].plugin)
                .is_ok_and(|other| other == *entry)
    });
    if same {
        return Ok(None);
    }
    let others = without_entry(text)?;
    let text = others.as_deref().unwrap_or(text);
    let list = parse(text)?;
    let places = self::places(text, &list)?;
    let Some(last) = places.last() else {
        return Err("it has no other plugin, after which ours could come".to_owned());
    };
    // What stands before the last stands before ours too.
    let before = text[..last.range.start].trim_end();
    let space = &text[before.len()..last.range.start];
    let (head, tail) = text.split_at(last.range.end);
    Ok(Some(format!("{head},{space}{entry}{tail}")))
}

/// The list without our entry; `None` if there was none.
///
/// # Errors
///
/// If it isn't a list of plugins: the text says why.
pub(super) fn without_entry(text: &str) -> Result<Option<String>, String> {
    let mut text = text.to_owned();
    let mut changed = false;
    loop {
        let list = parse(&text)?;
        let places = places(&text, &list)?;
        let Some(ours) = places.iter().position(|place| place.ours) else {
            return Ok(changed.then_some(text));
        };
        let range = match (ours.checked_sub(1), places.get(ours + 1)) {
            (Some(previous), _) => places[previous].range.end..places[ours].range.end,
            (None, Some(next)) => places[ours].range.start..next.range.start,
            (None, None) => places[ours].range.clone(),
        };
        text.replace_range(range, "");
        changed = true;
    }
}

fn parse(text: &str) -> Result<List<'_>, String> {
    serde_json::from_str(text).map_err(|error| format!("it is no list of CNI plugins: {error}"))
}

fn places<'a>(text: &str, list: &List<'a>) -> Result<Vec<Place<'a>>, String> {
    list.plugins
        .iter()
        .map(|plugin| {
            let plugin = plugin.get();
            // It is a part of the text, by which it was parsed.
            let start = plugin.as_ptr().addr() - text.as_ptr().addr();
            let Plugin { kind } = serde_json::from_str(plugin)
                .map_err(|error| format!("one of its plugins is none: {error}"))?;
            Ok(Place {
                plugin,
                range: start..start + plugin.len(),
                ours: kind == TYPE,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const LIST: &str = r#"{
  "name": "net", "cniVersion": "1.0.0", "odd": 1.10,
  "plugins": [
    { "type": "bridge", "mtu": 1450 },
    {"type":"portmap","capabilities":{"portMappings":true}}
  ]
}
"#;

    fn entry() -> Value {
        json!({ "type": TYPE, "socket": "/s" })
    }

    fn types(text: &str) -> Vec<String> {
        let list: Value = serde_json::from_str(text).unwrap();
        list["plugins"]
            .as_array()
            .unwrap()
            .iter()
            .map(|plugin| plugin["type"].as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn ours_comes_last_and_goes_without_a_trace() {
        let with = with_entry(LIST, &entry()).unwrap().unwrap();
        assert_eq!(types(&with), ["bridge", "portmap", TYPE]);
        assert!(with.contains("},\n    {\"socket\""), "{with}");
        assert_eq!(with_entry(&with, &entry()).unwrap(), None);
        assert_eq!(without_entry(&with).unwrap().unwrap(), LIST);
        assert_eq!(without_entry(LIST).unwrap(), None);
    }

    #[test]
    fn an_entry_with_other_settings_is_replaced() {
        let with = with_entry(LIST, &entry()).unwrap().unwrap();
        let other = json!({ "type": TYPE, "socket": "/other" });
        let with = with_entry(&with, &other).unwrap().unwrap();
        assert_eq!(types(&with), ["bridge", "portmap", TYPE]);
        assert_eq!(with_entry(&with, &other).unwrap(), None);
    }

    #[test]
    fn one_that_another_has_put_itself_after_stays_and_a_wrong_place_is_left() {
        let between = LIST.replace(
            "{\"type\":\"portmap\"",
            &format!("{}, {{\"type\":\"portmap\"", entry()),
        );
        assert_eq!(with_entry(&between, &entry()).unwrap(), None);
        assert_eq!(types(&without_entry(&between).unwrap().unwrap()).len(), 2);

        let first = LIST.replace(
            "{ \"type\": \"bridge\"",
            &format!("{},{{ \"type\": \"bridge\"", entry()),
        );
        let with = with_entry(&first, &entry()).unwrap().unwrap();
        assert_eq!(types(&with), ["bridge", "portmap", TYPE]);
        let twice = LIST.replace(
            "{ \"type\": \"bridge\"",
            &format!("{0},{0},{{ \"type\": \"bridge\"", entry()),
        );
        let with = with_entry(&twice, &entry()).unwrap().unwrap();
        assert_eq!(types(&with), ["bridge", "portmap", TYPE]);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for (text, why) in [
            ("", "no list"),
            ("{}", "cniVersion"),
            (r#"{"cniVersion":"1.0.0","type":"bridge"}"#, "plugins"),
            (r#"{"cniVersion":"1.0.0","plugins":[1]}"#, "none"),
            (r#"{"cniVersion":"1.0.0","plugins":[]}"#, "no other plugin"),
            (
                r#"{"cniVersion":"1.0.0","plugins":[{"type":"interceptor-cni"}]}"#,
                "no other plugin",
            ),
            (
                r#"{"cniVersion":"0.2.0","plugins":[{"type":"bridge"}]}"#,
                "0.2.0",
            ),
        ] {
            let error = with_entry(text, &entry()).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn putting_in_and_taking_out_changes_nothing(
            spaces in proptest::collection::vec("[ \n\t]{0,3}", 8),
            others in proptest::collection::vec("[a-z]{1,6}", 1..5),
            odd in "[a-z\u{e9}\u{1f600}]{0,4}",
        ) {
            let mut plugins = String::new();
            for (index, other) in others.iter().enumerate() {
                let comma = if index == 0 { "" } else { "," };
                plugins += &format!("{}{comma}{}{{\"type\":\"{other}\"}}", spaces[0], spaces[1]);
            }
            let text = format!(
                "{}{{\"odd\":\"{odd}\",\"cniVersion\":{}\"0.4.0\",{}\"plugins\"{}:{}[{plugins}{}]}}",
                spaces[2], spaces[3], spaces[4], spaces[5], spaces[6], spaces[7]
            );
            let with = with_entry(&text, &entry()).unwrap().unwrap();
            prop_assert!(types(&with).ends_with(&[TYPE.to_owned()]));
            prop_assert_eq!(with_entry(&with, &entry()).unwrap(), None);
            prop_assert_eq!(without_entry(&with).unwrap().unwrap(), text);
        }

        #[test]
        fn any_text_is_an_error_or_a_list(position: prop::sample::Index, patch in ".{0,4}") {
            let mut text = LIST.to_owned();
            let mut start = position.index(text.len());
            while !text.is_char_boundary(start) {
                start -= 1;
            }
            text.replace_range(start..=start, &patch);
            if let Ok(Some(with)) = with_entry(&text, &entry()) {
                prop_assert!(types(&with).contains(&TYPE.to_owned()));
            }
        }
    }
}
