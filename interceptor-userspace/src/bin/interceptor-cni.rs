//! The chained CNI plugin: container runtimes call it for each pod.

use std::{
    env,
    io::{self, Write as _},
    process::ExitCode,
};

use interceptor_userspace::cni;

fn main() -> ExitCode {
    let reply = cni::run(|name| env::var_os(name), io::stdin().lock(), cni::LIMIT);
    if let Some(warning) = &reply.warning {
        // Whoever reads it or not: the reply is what counts.
        let _ = writeln!(io::stderr(), "interceptor-cni: {warning}");
    }
    let written = io::stdout().write_all(reply.stdout.as_bytes());
    if reply.succeeded && written.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
