//! The emulator under the compiler's own sanitizers.

use std::path::Path;
use std::process::Command;

/// The same sources, with AddressSanitizer in place of the emulator's own checks of loads and stores: it also sees a thread's
/// own arrays, and the emulator itself.
#[test]
fn address_sanitizer_finds_no_mistake_but_the_planted_ones() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator-asan");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let built = Command::new(compiler)
        .args(["-std=c++17", "-O1", "-g1", "-fsanitize=address", "-Wno-unknown-pragmas", "-I"])
        .arg(root.join("kernels"))
        .arg(root.join("tests/kernels/asan.cpp"))
        .arg("-o")
        .arg(&out)
        .args(["-ldl", "-lpthread"])
        .output();
    match built {
        Ok(o) if o.status.success() => {}
        Ok(o) if String::from_utf8_lossy(&o.stderr).contains("asan") => {
            return println!("skipped: this compiler has no AddressSanitizer: {}", String::from_utf8_lossy(&o.stderr));
        }
        Ok(o) => panic!("{}", String::from_utf8_lossy(&o.stderr)),
        Err(e) => return println!("skipped: no C++ compiler to build with AddressSanitizer: {e}"),
    }
    // Stacks are switched by hand, which its check for use after return cannot follow.
    let run = |case: &str| {
        let options = "detect_stack_use_after_return=0:detect_leaks=0";
        let o = Command::new(&out).arg(case).env("ASAN_OPTIONS", options).output().unwrap();
        (o.status.success(), String::from_utf8_lossy(&o.stderr).into_owned() + &String::from_utf8_lossy(&o.stdout))
    };
    let (well, said) = run("clean");
    assert!(well, "{said}");
    for (case, want) in [
        ("past_local", "stack-buffer-overflow"),
        ("past_static", "use-after-poison"),
        ("past_dynamic", "use-after-poison"),
        ("past_global", "use-after-poison"),
    ] {
        let (well, said) = run(case);
        assert!(!well && said.contains(want) && said.contains(case), "{case}: {want} is missing from:\n{said}");
    }
}
