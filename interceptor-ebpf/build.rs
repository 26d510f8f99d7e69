//! Has the kernel programs linked as every kernel's verifier takes them, and
//! rebuilt when the linker changes.

fn main() {
    // LLVM would lay some loops out so that their way back is a fall-through,
    // which Linux 6.1 and 5.10 refuse as a "back-edge".
    println!("cargo::rustc-link-arg-bins=--llvm-args=-disable-block-placement");
    if let Ok(linker) = which::which("bpf-linker") {
        println!("cargo::rerun-if-changed={}", linker.display());
    }
}
