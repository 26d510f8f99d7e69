//! A guest's first process, and what it reports.

use std::{fmt, fs::File, io::Read, path::PathBuf, time::Instant};

use anyhow::{Context, Result};

use super::{initramfs::MODULES, modules::Modules, qemu::End};

/// What a guest runs.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) name: String,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    /// Whether it is a suite, which leaves out [`OPTIONAL`] tests.
    pub(super) is_suite: bool,
}

/// Files that a kernel has if it was built with a feature that Interceptor does
/// without, the feature, and parts of the names of its tests.
const OPTIONAL: [(&str, &str, [&str; 2]); 1] = [(
    "/proc/sys/net/mptcp",
    "MPTCP (CONFIG_MPTCP)",
    ["mptcp", "multipath"],
)];

/// What begins a report: words that nothing else prints.
///
/// # Errors
///
/// If the kernel gives no random number.
pub(super) fn token() -> Result<String> {
    let mut random = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .context("read /dev/urandom")?;
    Ok(format!("guest-{:032x}", u128::from_ne_bytes(random)))
}

/// What a guest does before its jobs. Of the suite parity, which makes thousands of
/// connections, it runs a part: an emulated machine is slow. If a step fails, its first process ends,
/// which is a kernel panic.
const SETUP: &str = "\
#!/bin/busybox sh
set -e
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
chmod 1777 /tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ulimit -n 1048576
export PARITY_STEP=20
ip link set lo up
cd /tmp
";

/// The script that is a guest's first process.
pub(super) fn script(jobs: &[Job], token: &str, modules: &Modules) -> String {
    let mut script = SETUP.to_owned();
    for (name, _) in &modules.load {
        script += &format!("insmod {MODULES}/{name}.ko\n");
    }
    // From here on the report says what failed.
    script += &format!("set +e\necho {token} ready\nSKIP=\n");
    if jobs.iter().any(|job| job.is_suite) {
        for (file, feature, tests) in OPTIONAL {
            script += &format!(
                "[ -e {file} ] || {{ SKIP=\"$SKIP --skip {}\"; \
                 echo 'vm: this kernel lacks {feature}: not run are tests {}'; }}\n",
                tests.join(" --skip "),
                tests.join(", "),
            );
        }
    }
    for (number, job) in jobs.iter().enumerate() {
        script += &quoted(&job.program.display().to_string());
        for argument in &job.arguments {
            script += " ";
            script += &quoted(argument);
        }
        if job.is_suite {
            script += " $SKIP";
        }
        script += &format!(" < /dev/null\necho {token} job {number} $?\n");
    }
    script += &format!("echo {token} end\nreboot -f\n");
    script
}

/// A word of the shell's.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// What a guest has reported so far.
#[derive(Debug)]
pub(super) struct Report {
    token: String,
    since: Instant,
    jobs: Vec<(String, Option<i32>)>,
    /// What the jobs printed, line by line.
    printed: Vec<String>,
    ready: bool,
    ended: bool,
    failure: Option<String>,
}

impl Report {
    /// Nothing yet.
    pub(super) fn new(token: &str, jobs: &[Job]) -> Self {
        Self {
            token: token.to_owned(),
            since: Instant::now(),
            jobs: jobs.iter().map(|job| (job.name.clone(), None)).collect(),
            printed: Vec::new(),
            ready: false,
            ended: false,
            failure: None,
        }
    }

    /// Reads a line, and returns what to show of it, or instead of it.
    pub(super) fn read(&mut self, line: &str) -> String {
        let Some((others, report)) = line.split_once(&self.token) else {
            if self.ready && !self.ended {
                self.printed.push(line.to_owned());
            }
            return line.to_owned();
        };
        let words: Vec<&str> = report.split_whitespace().collect();
        let shown = match words.as_slice() {
            ["ready"] => {
                self.ready = true;
                let seconds = self.since.elapsed().as_secs();
                self.since = Instant::now();
                format!("vm: ready after {seconds} s")
            }
            ["job", number, status] => {
                let number = number.parse::<usize>().ok();
                let job = number.and_then(|number| self.jobs.get_mut(number));
                let (Some((name, reported)), Ok(status)) = (job, status.parse()) else {
                    return line.to_owned();
                };
                *reported = Some(status);
                let seconds = self.since.elapsed().as_secs();
                self.since = Instant::now();
                let result = if status == 0 { "ok" } else { "FAILED" };
                format!("vm: {name}: {result}, {seconds} s")
            }
            ["end"] => {
                self.ended = true;
                "vm: the end".to_owned()
            }
            _ => line.to_owned(),
        };
        format!("{others}{shown}")
    }

    /// What the jobs printed.
    pub(super) fn printed(&self) -> String {
        self.printed.join("\n")
    }

    /// The guest has ended.
    pub(super) fn end(&mut self, end: &End) {
        self.failure = match end {
            End::Killed(limit) => Some(format!("still running after {} s", limit.as_secs())),
            End::Exited(status) if !status.success() => Some(format!("QEMU: {status}")),
            End::Exited(_) if !self.ended => Some("ended without its success line".to_owned()),
            End::Exited(_) => None,
        };
    }

    /// Whether all jobs succeeded, and the guest said so.
    pub(super) fn succeeded(&self) -> bool {
        self.ended
            && self.failure.is_none()
            && self.jobs.iter().all(|(_, status)| *status == Some(0))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.succeeded() {
            return f.write_str("ok");
        }
        let mut causes: Vec<String> = self
            .jobs
            .iter()
            .filter_map(|(name, status)| match status {
                Some(0) => None,
                Some(status) if *status > 128 => Some(format!("{name} (signal {})", status - 128)),
                Some(_) => Some(name.clone()),
                None => Some(format!("{name} (not to its end)")),
            })
            .collect();
        if let Some(failure) = &self.failure {
            causes.insert(0, failure.clone());
        }
        write!(f, "FAILED: {}", causes.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt, process::ExitStatus, time::Duration};

    use super::*;

    fn jobs() -> Vec<Job> {
        ["cases", "sockets"]
            .map(|name| Job {
                name: name.to_owned(),
                program: format!("/target/{name}").into(),
                arguments: vec!["it's".to_owned()],
                is_suite: name == "cases",
            })
            .to_vec()
    }

    fn report(lines: &[&str], end: &End) -> Report {
        let mut report = Report::new("token", &jobs());
        for line in lines {
            report.read(line);
        }
        report.end(end);
        report
    }

    fn exited() -> End {
        End::Exited(ExitStatus::from_raw(0))
    }

    #[test]
    fn a_guest_succeeds_only_if_it_says_so() {
        let all = ["token job 0 0", "token job 1 0", "token end"];
        let good = report(&all, &exited());
        assert!(good.succeeded());
        assert_eq!(good.to_string(), "ok");
        for (lines, end, expected) in [
            (
                &all[..1],
                exited(),
                "FAILED: ended without its success line, sockets (not to its end)",
            ),
            (
                &all[..],
                End::Killed(Duration::from_secs(9)),
                "FAILED: still running after 9 s",
            ),
            (
                &["token job 0 101", "token job 1 139", "token end"],
                exited(),
                "FAILED: cases, sockets (signal 11)",
            ),
            (
                &["other job 0 0", "other job 1 0", "end"],
                exited(),
                "FAILED: ended without its success line, cases (not to its end), \
                 sockets (not to its end)",
            ),
        ] {
            let bad = report(lines, &end);
            assert!(!bad.succeeded());
            assert_eq!(bad.to_string(), expected);
        }
    }

    #[test]
    fn what_others_print_is_shown() {
        let mut report = Report::new("token", &jobs());
        assert_eq!(report.read("test a ... ok"), "test a ... ok");
        assert_eq!(report.read("token ready"), "vm: ready after 0 s");
        assert_eq!(report.read("token job 0 0"), "vm: cases: ok, 0 s");
        assert_eq!(
            report.read("no newline; token job 1 9"),
            "no newline; vm: sockets: FAILED, 0 s"
        );
        assert_eq!(report.jobs[1].1, Some(9));
        assert_eq!(report.read("token job 2 0"), "token job 2 0");
        assert_eq!(report.printed(), "");
        report.read("{");
        report.read("}");
        assert_eq!(report.printed(), "{\n}");
    }

    #[test]
    fn each_guest_has_a_token_of_its_own() {
        assert_ne!(token().unwrap(), token().unwrap());
    }

    #[test]
    fn the_script_loads_the_modules_and_runs_the_jobs() {
        let modules = Modules {
            load: vec![("veth".to_owned(), Vec::new())],
            missing: Vec::new(),
        };
        let script = script(&jobs(), "token", &modules);
        for line in [
            "insmod /modules/veth.ko",
            r"'/target/cases' 'it'\''s' $SKIP < /dev/null",
            r"'/target/sockets' 'it'\''s' < /dev/null",
            "echo token job 1 $?",
            "echo token end",
        ] {
            assert!(
                script.lines().any(|other| other == line),
                "{line}\n{script}"
            );
        }
    }
}
