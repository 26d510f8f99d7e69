//! The plugin against a socket whose other end speaks the daemon's protocol.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixListener,
    path::PathBuf,
    thread::JoinHandle,
};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::api::{CniAttachment, CniPod};

/// A previous result whose spaces, order of keys and number no parser would keep.
const PREVIOUS: &str =
    r#"{ "ips":[{"address": "10.0.0.5/24"}],"cniVersion" :"1.0.0", "x":1.10, "a":[] }"#;

const SOON: Duration = Duration::from_secs(5);

/// A server that answers once, and gives back what it was asked.
struct Daemon {
    directory: TempDir,
    thread: JoinHandle<Request>,
}

impl Daemon {
    fn answering(answer: Answer) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let thread = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = Vec::new();
            BufReader::new(&stream)
                .read_until(b'\n', &mut line)
                .unwrap();
            stream.write_all(&api::to_line(&answer).unwrap()).unwrap();
            api::from_line(&line).unwrap()
        });
        Self { directory, thread }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn asked(self) -> Request {
        self.thread.join().unwrap()
    }
}

/// What a runtime sets.
fn environment(command: &str) -> BTreeMap<&'static str, OsString> {
    BTreeMap::from([
        ("CNI_COMMAND", command.into()),
        ("CNI_CONTAINERID", "c0ffee".into()),
        ("CNI_NETNS", "/run/netns/pod".into()),
        ("CNI_IFNAME", "eth0".into()),
        (
            "CNI_ARGS",
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0".into(),
        ),
    ])
}

fn configuration(socket: &Path, version: &str) -> Value {
    json!({
        "cniVersion": version,
        "name": "net",
        "type": "interceptor-cni",
        "socket": socket,
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"a": "b"}},
        "cni.dev/valid-attachments": [{"containerID": "c0ffee", "ifname": "eth0"}],
    })
}

/// The configuration with a previous result, written as it is.
fn chained(configuration: &Value) -> String {
    let text = configuration.to_string();
    format!(
        r#"{},"prevResult":{PREVIOUS}}}"#,
        text.strip_suffix('}').unwrap()
    )
}

fn call(command: &str, text: &str) -> Reply {
    call_in(&environment(command), text.as_bytes(), SOON)
}

fn call_in(environment: &BTreeMap<&'static str, OsString>, text: &[u8], limit: Duration) -> Reply {
    run(|name| environment.get(name).cloned(), text, limit)
}

/// The code and the details of an error object.
fn error(reply: &Reply) -> (u64, String) {
    assert!(!reply.succeeded, "{reply:?}");
    let object: Value = serde_json::from_str(&reply.stdout).unwrap();
    assert!(
        object["cniVersion"].is_string() && object["msg"] != "",
        "{object}"
    );
    (
        object["code"].as_u64().unwrap(),
        object["details"].as_str().unwrap().to_owned(),
    )
}

fn assert_error(reply: &Reply, code: u64, words: &str) {
    let (was, details) = error(reply);
    assert_eq!(was, code, "{details}");
    assert!(details.contains(words), "{details}");
}

fn attachment() -> CniAttachment {
    CniAttachment {
        container_id: "c0ffee".to_owned(),
        interface: "eth0".to_owned(),
    }
}

fn pod() -> CniPod {
    CniPod {
        attachment: attachment(),
        netns: "/run/netns/pod".into(),
        namespace: Some("shop".to_owned()),
        name: Some("web-0".to_owned()),
        uid: None,
        annotations: Some(BTreeMap::from([("a".to_owned(), "b".to_owned())])),
        args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0".to_owned(),
    }
}

#[test]
fn add_tells_the_daemon_and_hands_the_result_on_as_it_was_written() {
    for answer in [
        Answer::Attached {
            pod: "web".to_owned(),
        },
        Answer::LeftAlone {
            because: "it has no proxy".to_owned(),
        },
    ] {
        let daemon = Daemon::answering(answer);
        let reply = call("ADD", &chained(&configuration(&daemon.socket(), "1.0.0")));
        assert_eq!(reply, success(format!("{PREVIOUS}\n")));
        assert_eq!(daemon.asked(), Request::CniAdd(pod()));
    }
}

#[test]
fn the_other_commands_say_nothing_when_all_is_well() {
    for (command, request) in [
        ("DEL", Request::CniDel(attachment())),
        ("CHECK", Request::CniCheck(pod())),
        (
            "GC",
            Request::CniGc {
                valid: vec![attachment()],
            },
        ),
        ("STATUS", Request::CniStatus),
    ] {
        let daemon = Daemon::answering(Answer::Done);
        let reply = call(command, &chained(&configuration(&daemon.socket(), "1.1.0")));
        assert_eq!(reply, success(String::new()), "{command}");
        assert_eq!(daemon.asked(), request);
    }
}

#[test]
fn a_refusal_is_an_error_with_the_daemons_reason() {
    for (again, code) in [(true, 11), (false, u64::from(REFUSED))] {
        for (command, code) in [
            ("ADD", code),
            ("DEL", code),
            ("CHECK", code),
            ("STATUS", 50),
        ] {
            let daemon = Daemon::answering(Answer::Refused {
                error: "the cgroup is gone".to_owned(),
                again,
            });
            let reply = call(command, &chained(&configuration(&daemon.socket(), "1.1.0")));
            assert_error(&reply, code, "the cgroup is gone");
        }
    }
    let daemon = Daemon::answering(Answer::Pods { pods: Vec::new() });
    let reply = call("ADD", &chained(&configuration(&daemon.socket(), "1.1.0")));
    assert_error(&reply, u64::from(ODD_ANSWER), "from one release");
}

#[test]
fn without_a_daemon_a_pod_fails_or_passes_as_it_is_configured() {
    let nobody = Path::new("/nonexistent/socket");
    let mut configuration = configuration(nobody, "1.1.0");
    for (command, code) in [("ADD", 11), ("CHECK", 11), ("STATUS", 50)] {
        let reply = call(command, &chained(&configuration));
        assert_error(&reply, code, "is `interceptor daemon` running?");
    }
    for command in ["DEL", "GC"] {
        let reply = call(command, &chained(&configuration));
        assert_eq!(reply, success(String::new()), "{command}");
    }

    configuration["on_error"] = json!("pass");
    let reply = call("ADD", &chained(&configuration));
    assert!(reply.succeeded && reply.stdout == format!("{PREVIOUS}\n"));
    assert!(reply.warning.unwrap().contains("NOT intercepted"));
    for command in ["CHECK", "STATUS", "DEL", "GC"] {
        assert_eq!(
            call(command, &chained(&configuration)),
            success(String::new())
        );
    }

    configuration["on_error"] = json!("perhaps");
    assert_error(&call("ADD", &chained(&configuration)), 7, "perhaps");
}

#[test]
fn a_daemon_that_says_nothing_is_waited_for_only_so_long() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let start = std::time::Instant::now();
    for command in ["ADD", "DEL", "CHECK"] {
        let reply = call_in(
            &environment(command),
            chained(&configuration(&socket, "1.1.0")).as_bytes(),
            Duration::from_millis(100),
        );
        assert_error(&reply, 11, "has not answered within 100ms");
    }
    // One that answers byte by byte isn't waited for any longer.
    let trickle = thread::spawn(move || {
        for stream in listener.incoming().take(4) {
            let mut stream = stream.unwrap();
            while stream.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        }
    });
    let reply = call_in(
        &environment("ADD"),
        chained(&configuration(&socket, "1.1.0")).as_bytes(),
        Duration::from_millis(200),
    );
    assert_error(&reply, 11, "has not answered");
    assert!(start.elapsed() < SOON);
    drop(trickle);
}

#[test]
fn what_the_runtime_gets_wrong_is_named() {
    let socket = Path::new("/nonexistent/socket");
    let good = configuration(socket, "1.1.0");
    let without = |name| {
        let mut environment = environment("ADD");
        environment.remove(name);
        call_in(&environment, chained(&good).as_bytes(), SOON)
    };
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        let (code, details) = error(&without(name));
        assert_eq!(code, 4, "{details}");
    }
    assert_error(&without("CNI_COMMAND"), 4, "a container runtime calls");
    assert_error(&call("FROB", &chained(&good)), 4, "FROB");
    assert_error(&call("ADD", "{"), 6, "no JSON");
    assert_error(&call("ADD", ""), 6, "no JSON");
    assert_error(&call("ADD", "[]"), 7, "interceptor-cni");
    assert_error(&call("ADD", &good.to_string()), 7, "no prevResult");
    assert_error(
        &call("ADD", &chained(&configuration(socket, "9.0.0"))),
        1,
        "9.0.0",
    );
    for (command, version) in [("GC", "1.0.0"), ("STATUS", "0.4.0"), ("CHECK", "0.3.1")] {
        let reply = call(command, &chained(&configuration(socket, version)));
        assert_error(&reply, 1, command);
    }
    let mut all = good.clone();
    all.as_object_mut()
        .unwrap()
        .remove("cni.dev/valid-attachments");
    assert_error(&call("GC", &all.to_string()), 7, "every pod");
    let long = " ".repeat(api::MAX_MESSAGE + 1);
    assert_error(&call("ADD", &long), 6, "more than");
}

#[test]
fn an_error_is_in_the_version_of_the_configuration() {
    let reply = call("ADD", r#"{"cniVersion":"0.4.0"}"#);
    let object: Value = serde_json::from_str(&reply.stdout).unwrap();
    assert_eq!(object["cniVersion"], "0.4.0");
}

#[test]
fn the_versions_are_told_in_the_askers_own() {
    for (input, version) in [
        (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"),
        (r#"{"cniVersion":"9.0.0"}"#, "1.1.0"),
        ("", "1.1.0"),
    ] {
        let reply = call("VERSION", input);
        assert!(reply.succeeded);
        let object: Value = serde_json::from_str(&reply.stdout).unwrap();
        assert_eq!(object["cniVersion"], version);
        for supported in ["0.4.0", "1.0.0", "1.1.0"] {
            let versions = object["supportedVersions"].as_array().unwrap();
            assert!(versions.contains(&json!(supported)), "{object}");
        }
    }
}

/// Whatever came in, the reply is what a runtime can read.
fn assert_readable(reply: &Reply) -> Result<(), TestCaseError> {
    if reply.succeeded {
        prop_assert!(
            reply.stdout.is_empty()
                || serde_json::from_str::<Value>(&reply.stdout)
                    .is_ok_and(|value| value.is_object())
        );
        return Ok(());
    }
    let object: Value = serde_json::from_str(&reply.stdout)
        .map_err(|error| TestCaseError::fail(format!("{error}: {reply:?}")))?;
    prop_assert!(object["code"].as_u64().is_some_and(|code| code > 0));
    prop_assert!(object["msg"].as_str().is_some_and(|text| !text.is_empty()));
    Ok(())
}

const COMMANDS: [&str; 6] = ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"];

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".*".prop_map(Value::from),
        proptest::collection::vec(".*", 0..3).prop_map(Value::from),
        Just(json!({"a": {"b": [1, null]}})),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bytes_that_mean_nothing_are_an_error_and_nothing_else(
        command in proptest::sample::select(&COMMANDS[..5]),
        text in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let reply = call_in(&environment(command), &text, SOON);
        prop_assert!(!reply.succeeded);
        assert_readable(&reply)?;
    }

    #[test]
    fn a_damaged_configuration_is_an_error_and_nothing_else(
        command in proptest::sample::select(&COMMANDS[..]),
        position: proptest::sample::Index,
        length in 0usize..8,
        patch in proptest::collection::vec(any::<u8>(), 0..8),
    ) {
        let mut text = chained(&configuration(Path::new("/nonexistent"), "1.1.0")).into_bytes();
        let start = position.index(text.len());
        let end = text.len().min(start + length);
        text.splice(start..end, patch);
        assert_readable(&call_in(&environment(command), &text, SOON))?;
    }

    #[test]
    fn a_value_of_another_kind_is_an_error_and_nothing_else(
        command in proptest::sample::select(&COMMANDS[..]),
        key in proptest::sample::select(&[
            "cniVersion", "name", "type", "on_error", "prevResult", "runtimeConfig",
            "cni.dev/valid-attachments",
        ][..]),
        value in any_value(),
    ) {
        let mut configuration = configuration(Path::new("/nonexistent"), "1.1.0");
        configuration["prevResult"] = json!({});
        configuration[key] = value;
        let reply = call_in(&environment(command), configuration.to_string().as_bytes(), SOON);
        assert_readable(&reply)?;
        prop_assert!(!(reply.succeeded && command == "ADD"));
    }

    #[test]
    fn a_damaged_environment_is_an_error_and_nothing_else(
        name in proptest::sample::select(&[
            "CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS",
        ][..]),
        value in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        use std::os::unix::ffi::OsStringExt as _;
        let mut environment = environment("ADD");
        environment.insert(name, OsString::from_vec(value));
        let text = chained(&configuration(Path::new("/nonexistent"), "1.1.0"));
        let reply = call_in(&environment, text.as_bytes(), SOON);
        prop_assert!(!reply.succeeded);
        assert_readable(&reply)?;
    }
}
