//! The `python` tool with a real interpreter: what code finds, what comes back, hostile code, and failures of the machinery.
//!
//! On first use on a machine this makes the tool's Python environment in the user's cache folder, as `varft` itself does.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use image::{Rgb, RgbImage};
use varft::Error;
use varft::tools::{Limits, Outcome, PythonOptions, PythonTool, Tool, ToolCall, ToolResult};

/// One tool for all tests that leave its process alone.
fn tool() -> &'static PythonTool {
    static TOOL: OnceLock<PythonTool> = OnceLock::new();
    TOOL.get_or_init(|| {
        eprintln!("setting up the python tool (the first time on a machine this downloads numpy, OpenCV and Pillow)");
        PythonTool::new(PythonOptions { concurrency: 4, ..PythonOptions::default() }).unwrap()
    })
}

fn own_tool() -> PythonTool {
    tool(); // so that only one makes the environment and its progress is seen once
    PythonTool::new(PythonOptions { concurrency: 4, ..PythonOptions::default() }).unwrap()
}

fn picture(width: u32, height: u32) -> Arc<RgbImage> {
    Arc::new(RgbImage::from_fn(width, height, |x, y| Rgb([(x * 7) as u8, (y * 5) as u8, (x ^ y) as u8])))
}

fn run(code: &str) -> ToolResult {
    tool().run(ToolCall::new(code).image(picture(40, 30))).unwrap()
}

fn ok(code: &str) -> ToolResult {
    let result = run(code);
    assert_eq!(result.outcome, Outcome::Ok, "{code}\n{}", result.stderr);
    result
}

fn program_error(code: &str) -> String {
    match run(code).outcome {
        Outcome::ProgramError(what) => what,
        other => panic!("{code}\n{other:?}"),
    }
}

fn limited(code: &str, limits: Limits) -> ToolResult {
    let mut call = ToolCall::new(code).image(picture(40, 30));
    call.limits = limits;
    tool().run(call).unwrap()
}

// ---- what code finds and what comes back

#[test]
fn all_files_together_have_a_limit_and_many_folders_hold_up_nobody() {
    let small = Limits { file: 1 << 20, ..Limits::default() };
    let write = "for i in range(9): open(str(i), 'wb').write(b'x' * 900000)\n";
    assert_eq!(limited(write, small.clone()).outcome, Outcome::ScratchLimit);
    let endless = format!("{write}while True: pass");
    let result = limited(&endless, small.clone());
    assert_eq!(result.outcome, Outcome::ScratchLimit);
    assert!(result.usage.cpu < small.cpu, "stopped while it ran: {:?}", result.usage);
    let deep = "import os\nfor i in range(3000):\n  os.mkdir('d'); os.chdir('d')";
    assert_eq!(limited(deep, Limits::default()).outcome, Outcome::Ok);
}

#[test]
fn text_that_is_no_unicode_reaches_the_model_escaped() {
    let result = limited("raise Exception('\\ud800!')", Limits::default());
    assert!(result.outcome.message().ends_with("Exception: \\ud800!\n"), "{:?}", result.outcome);
}

#[test]
fn the_image_is_there_as_array_and_file_and_comes_back_exactly() {
    let turned = image::imageops::rotate180(&*picture(40, 30));
    for code in [
        "image = cv2.rotate(image, cv2.ROTATE_180)",
        "result = image[::-1, ::-1]",
        "image[:] = image[::-1, ::-1].copy()",
        "import cv2\nimg = cv2.imread(image_path)\ncv2.imwrite('out.png', cv2.rotate(img, cv2.ROTATE_180))",
        "cv2.imwrite('lossy.jpg', cv2.rotate(cv2.imread('path_to_input_image.jpg'), cv2.ROTATE_180))",
        "cv2.imwrite('/path/to/output.png', cv2.rotate(cv2.imread('/path/to/input.png'), cv2.ROTATE_180))",
        "im = Image.open(image_path).rotate(180)\nim.save('x.png')",
        "result = Image.open('nowhere.png').transpose(Image.Transpose.ROTATE_180)",
        "from PIL import Image as P, ImageOps\nresult = ImageOps.flip(ImageOps.mirror(P.open(image_path)))",
        // What it saved can be read again, and the last one saved counts.
        "cv2.imwrite('a.jpg', image)\ncv2.imwrite('b.png', cv2.rotate(cv2.imread('a.jpg'), cv2.ROTATE_180))",
        "cv2.imwrite('/tmp/no/a.jpg', cv2.rotate(image, cv2.ROTATE_180))\nresult = 1\nassert cv2.imread('/tmp/no/a.jpg').shape == (30, 40, 3)",
    ] {
        assert_eq!(ok(code).image.as_ref(), Some(&turned), "{code}");
    }
}

#[test]
fn nothing_done_is_no_image() {
    for code in ["", "print(image.shape)", "image = image.copy()", "del image", "result = 5", "result = np.arange(9)"] {
        assert!(ok(code).image.is_none(), "{code}");
    }
    let result = tool().run(ToolCall::new("print('image' in globals())")).unwrap();
    assert_eq!((result.stdout.as_str(), result.image), ("False\n", None));
}

#[test]
fn all_images_of_the_conversation_are_there_and_the_last_is_the_one_worked_on() {
    let code = "print([i.shape for i in images], image.shape, len(image_paths), image_paths[-1] == image_path)\n\
                print(all(np.array_equal(i, cv2.imread(p)) for i, p in zip(images, image_paths)))\nresult = images[0]";
    let (first, last) = (picture(5, 4), picture(7, 3));
    let result = tool().run(ToolCall::new(code).image(first.clone()).image(last)).unwrap();
    assert_eq!(result.stdout, "[(4, 5, 3), (3, 7, 3)] (3, 7, 3) 2 True\nTrue\n");
    assert_eq!(result.image.as_ref(), Some(&*first));
}

#[test]
fn results_of_other_types_become_rgb() {
    let pixel = |code: &str| ok(code).image.unwrap().get_pixel(0, 0).0;
    assert_eq!(pixel("result = np.full((2, 2), 9, np.uint8)"), [9, 9, 9]);
    assert_eq!(pixel("result = np.full((2, 2, 1), 9, np.uint8)"), [9, 9, 9]);
    assert_eq!(pixel("result = np.zeros((2, 2, 4), np.uint8) + np.uint8([1, 2, 3, 255])"), [3, 2, 1]);
    assert_eq!(pixel("result = np.float64([[[-4, 99.6, 1e9]]])"), [255, 100, 0]);
    assert_eq!(pixel("result = np.full((2, 2), np.nan)"), [0, 0, 0]);
    assert_eq!(pixel("result = image > 999"), [0, 0, 0]);
    assert_eq!(pixel("result = np.ones((3, 3), bool)"), [255, 255, 255]);
    assert_eq!(pixel("result = Image.new('LA', (3, 3), (8, 200))"), [8, 8, 8]);
    assert!(program_error("result = np.zeros((4, 4, 7))").contains("(4, 4, 7)"));
    assert!(program_error("image = image[5:5]").contains("empty"));
}

#[test]
fn text_comes_back_clean() {
    let result =
        ok("import sys\nprint('a\\x1b[31mb')\nprint('e\\x07', file=sys.stderr)\nimport os\nos.write(1, b'\\xff!')");
    assert_eq!((result.stdout.as_str(), result.stderr.as_str()), ("ab\n\u{fffd}!", "e\n"));
    assert!(
        result.usage.cpu > Duration::ZERO
            && result.usage.wall >= result.usage.queued
            && result.usage.peak_memory > 1 << 20
    );
}

#[test]
fn a_seed_makes_a_call_repeatable() {
    let draw = |seed| {
        let code = "import random\nprint(random.random(), np.random.rand(), cv2.randn(np.zeros(3), 0, 9), hash('x'))";
        tool().run(ToolCall { seed, ..ToolCall::new(code) }).unwrap().stdout
    };
    assert_eq!(draw(1 << 40), draw(1 << 40));
    assert_ne!(draw(3), draw(4));
}

#[test]
fn tracebacks_are_those_of_the_code_alone() {
    let text = program_error("def f(x):\n    return cv2.cvtColor(x, 99)\n\nf(1 / 0)");
    assert!(
        text.starts_with("Traceback (most recent call last):\n  File \"<code>\", line 4, in <module>\n    f(1 / 0)\n"),
        "{text}"
    );
    assert!(text.ends_with("ZeroDivisionError: division by zero\n") && text.matches("File").count() == 1, "{text}");
    assert!(program_error("if True\n  x").contains("SyntaxError"));
    assert!(program_error("import matplotlib").contains("No module named 'matplotlib'"));
    assert!(program_error("raise ValueError('\\x1b[2J' + 'y' * 99999)").len() < 4200);
    assert!(program_error("class E(Exception):\n    def __str__(self): raise SystemExit\nraise E()").contains('E'));
}

#[test]
fn calls_do_not_see_each_other() {
    ok("import builtins\nbuiltins.leak = 1\ncv2.leak = 1\nopen('leak', 'w').write('x')\nnp.random.seed(1)");
    ok("import builtins, os\nassert not hasattr(builtins, 'leak') and not hasattr(cv2, 'leak')\n\
        assert os.listdir('.') == ['image_1.ppm'], os.listdir('.')");
    ok("import os, sys, tempfile\nassert not os.environ, os.environ\nassert sys.stdin.read() == ''\n\
        assert tempfile.gettempdir() == os.getcwd()\nassert sorted(os.listdir('/proc/self/fd'))[:3] == ['0', '1', '2']");
}

#[test]
fn a_check_goes_through_all_of_it() {
    assert!(tool().check().unwrap().wall < Duration::from_secs(60));
    let versions = tool().versions().unwrap();
    assert!(versions.python.starts_with("3.") && !versions.cv2.is_empty(), "{versions:?}");
    assert_eq!(tool().name(), "python");
}

#[test]
fn many_calls_at_once() {
    std::thread::scope(|scope| {
        for t in 0..8u8 {
            scope.spawn(move || {
                for i in 0..6u8 {
                    let v = t * 20 + i;
                    let call = ToolCall::new(format!("print({v})\nimage = image * 0 + {v}")).image(picture(64, 48));
                    let result = tool().run(call).unwrap();
                    assert_eq!(result.stdout, format!("{v}\n"));
                    assert_eq!(result.image.unwrap().get_pixel(9, 9).0, [v; 3]);
                }
            });
        }
    });
}

// ---- the model's fault: limits and hostile code

#[test]
fn processor_time_is_limited_and_told_from_other_ends() {
    let limits = Limits { cpu: Duration::from_secs(1), ..Limits::default() };
    for code in ["while True: pass", "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"] {
        let result = limited(code, limits.clone());
        assert_eq!(result.outcome, Outcome::CpuLimit, "{code}");
        assert!(result.usage.cpu >= Duration::from_millis(900), "{code} {:?}", result.usage);
    }
    let kept = limited("print('before')\nwhile True: pass", limits);
    assert_eq!((kept.outcome, kept.stdout.as_str()), (Outcome::CpuLimit, "before\n"));
}

#[test]
fn memory_is_limited() {
    let limits = Limits { memory: 256 << 20, ..Limits::default() };
    for code in [
        "x = np.ones(1 << 30, np.uint8)",
        "x = []\nwhile True: x.append(bytearray(1 << 24))",
        "image = np.zeros((60000, 60000, 3), np.uint8)",
        "x = cv2.resize(image, (30000, 30000))",
    ] {
        assert_eq!(limited(code, limits.clone()).outcome, Outcome::MemoryLimit, "{code}");
    }
    assert_eq!(limited("x = np.ones(100 << 20, np.uint8)", limits).outcome, Outcome::Ok);
}

#[test]
fn output_and_files_are_limited() {
    let small = Limits { output: 1000, ..Limits::default() };
    for code in ["print('x' * 1001)", "while True: print('y')", "import sys\nsys.stderr.write('z' * 5000)"] {
        let result = limited(code, small.clone());
        assert_eq!(result.outcome, Outcome::OutputLimit, "{code}");
        assert!(result.stdout.len() <= 1000 && result.stderr.len() <= 1000);
    }
    assert_eq!(limited("print('x' * 999)", small).outcome, Outcome::Ok);
    // The image travels by a file of its own and is not subject to the limit on files.
    let files = Limits { file: 1000, ..Limits::default() };
    assert_eq!(
        limited("with open('f', 'wb') as f: f.write(b'x' * 1001)", files.clone()).outcome,
        Outcome::FileSizeLimit
    );
    assert!(limited("image = 255 - image", files).image.is_some());
    let images = Limits { image: 1000, ..Limits::default() };
    let result = limited("image = 255 - image", images);
    assert_eq!((result.outcome, result.image), (Outcome::OutputLimit, None));
}

#[test]
fn limits_as_large_as_can_be_are_none() {
    let (most, wall) = (u64::MAX, Duration::MAX);
    let limits = Limits { cpu: wall, wall, memory: most, file: most, output: usize::MAX, image: usize::MAX };
    let result = limited("print(1)\nimage = 255 - image", limits);
    assert_eq!((result.outcome, result.stdout.as_str(), result.image.is_some()), (Outcome::Ok, "1\n", true));
}

#[test]
fn ends_of_all_kinds() {
    assert_eq!(ok("import sys\nprint(1)\nsys.exit()").stdout, "1\n");
    ok("raise SystemExit(0)");
    assert!(program_error("import sys\nsys.exit('no image')").contains("no image"));
    assert!(program_error("import os\nos._exit(0)").contains("exit status 0"));
    assert!(program_error("import os\nos._exit(97)").contains("exit status 97"));
    assert!(program_error("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)").contains("segmentation fault"));
    assert!(
        program_error("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)").contains("killed its own process")
    );
    assert!(program_error("import ctypes\nctypes.string_at(1)").contains("segmentation fault"));
    assert!(program_error("raise KeyboardInterrupt").contains("KeyboardInterrupt"));
    assert!(program_error("def f(): f()\nf()").contains("RecursionError"));
    let small = Limits { cpu: Duration::from_secs(1), memory: 64 << 20, ..Limits::default() };
    let deep = limited("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", small).outcome;
    assert!(matches!(deep, Outcome::ProgramError(_) | Outcome::MemoryLimit | Outcome::CpuLimit), "{deep:?}");
}

#[test]
fn what_it_breaks_is_its_own() {
    assert!(
        program_error("import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass")
            .contains("result")
    );
    ok("import os\nos.close(1)\nos.close(2)");
    ok("import sys\nsys.stdout = sys.stderr = open('x', 'w')");
    assert!(program_error("import sys\nsys.stdout = None").contains("AttributeError"));
    program_error("import json, builtins\njson.dumps = None\ncv2.cvtColor = None\nimage = 255 - image");
    program_error("import os\nos.ftruncate(4, 0)\nos.pwrite(4, b'\\xff' * 100, 0)\nos._exit(0)");
    // Files named as results that are none: nothing waits for a pipe, nothing follows a link.
    ok("import os\nos.mkfifo('result.png')\nos.symlink('/etc/passwd', 'out.png')\nos.mkdir('image.png')");
    program_error("cv2.imwrite('out.txt', image)");
    assert!(ok("assert cv2.imread('/etc/passwd') is None").image.is_none());
}

#[test]
fn processes_and_threads_are_denied() {
    for code in [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['ls'])",
        "import os\nassert os.system('true') == 0, 'denied'",
        "import threading\nthreading.Thread(target=print).start()",
    ] {
        program_error(code);
    }
}

#[test]
fn the_warm_process_is_out_of_reach() {
    let mine = own_tool();
    let before = mine.processes();
    let root = unsafe { libc::geteuid() } == 0;
    let mut attacks =
        vec!["import os\nos.kill(os.getppid(), 9)", "open(f'/proc/{__import__(\"os\").getppid()}/mem', 'r+b').read(1)"];
    if root {
        // Not for an ordinary user, whose own processes it would all reach.
        attacks.push("import os\nos.kill(-1, 9)\nraise ValueError");
    }
    for code in attacks {
        match mine.run(ToolCall::new(code)) {
            Ok(result) => assert_ne!(result.outcome, Outcome::Ok, "{code}"),
            // An ordinary user cannot be kept from killing his own processes: a failure of the machinery then.
            Err(e) => assert!(!root && matches!(e, Error::Tool { .. }), "{code}: {e}"),
        }
    }
    if root {
        assert_eq!(mine.processes(), before, "it lives");
    }
    mine.check().unwrap();
}

#[test]
fn scratch_folders_are_private_and_go_away() {
    let scratch = tempfile::tempdir().unwrap();
    let options = PythonOptions { scratch: scratch.path().into(), concurrency: 2, ..PythonOptions::default() };
    tool();
    let mine = PythonTool::new(options).unwrap();
    let code = "import os\nos.makedirs('a/b/c')\nopen('a/b/f', 'w').write('x')\nos.symlink('/', 'root')\nos.chmod('a/b', 0)\n\
                for i in range(400):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)";
    assert_eq!(mine.run(ToolCall::new(code)).unwrap().outcome, Outcome::Ok);
    // What takes long goes on in the background.
    let (mut left, end) = (walk(scratch.path()), Instant::now() + Duration::from_secs(60));
    while left.len() > 2 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
        left = walk(scratch.path());
    }
    assert_eq!(left.len(), 2, "the tool's folder and its process's: {left:?}");
    drop(mine);
    assert_eq!(walk(scratch.path()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_scratch_folder_that_is_removed_is_made_again() {
    let scratch = tempfile::tempdir().unwrap();
    let options = PythonOptions { scratch: scratch.path().into(), concurrency: 2, ..PythonOptions::default() };
    tool();
    let mine = PythonTool::new(options).unwrap();
    mine.check().unwrap();
    let before = mine.processes();
    for all in walk(scratch.path()).iter().filter(|p| p.parent() == Some(scratch.path())) {
        std::fs::remove_dir_all(all).unwrap();
    }
    mine.check().unwrap();
    assert_eq!(mine.processes(), before);
    drop(mine);
    assert_eq!(walk(scratch.path()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_process_whose_owner_goes_while_it_starts_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let own = scratch.path().join("varft/0");
    std::fs::create_dir_all(&own).unwrap();
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: there is room for two descriptors, which are ours when the call succeeds.
    let (ours, theirs) = unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    };
    let mut process = Command::new(tool().interpreter())
        .args(["-s", "-B", "-c", include_str!("../src/tools/python/zygote.py")])
        .current_dir(&own)
        .stdin(theirs)
        .spawn()
        .unwrap();
    drop(ours);
    process.wait().unwrap();
    assert_eq!(walk(scratch.path()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn memory_that_a_call_shares_and_leaves_goes_with_the_tool() {
    if !Command::new("unshare").args(["--ipc", "true"]).status().is_ok_and(|s| s.success()) {
        println!("not shown: here nobody may give a process such memory of its own");
        return;
    }
    let mine = own_tool();
    let key = 0x7661_7266u32 ^ std::process::id();
    let code = format!("import ctypes\nprint(ctypes.CDLL(None).shmget({key}, 4096, 0o1600) >= 0)");
    let said = mine.run(ToolCall::new(code)).unwrap().stdout;
    assert_eq!(said, "True\n");
    let segments = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
    let left = segments.lines().any(|l| l.split_whitespace().next() == Some(&(key as i32).to_string()));
    assert!(!left, "{segments}");
}

fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut all = Vec::new();
    // Some of it may be going away meanwhile.
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        all.push(entry.path());
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            all.extend(walk(&entry.path()));
        }
    }
    all
}

// ---- the machinery's fault

fn kill(pid: u32, signal: i32) {
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

#[test]
fn a_clock_overrun_is_the_machinerys_fault() {
    let mut call = ToolCall::new("while True: pass");
    call.limits.wall = Duration::from_millis(700);
    let begun = Instant::now();
    let e = tool().run(call).unwrap_err();
    assert!(matches!(&e, Error::Tool { tool, what } if tool == "python" && what.contains("700ms")), "{e}");
    assert!(begun.elapsed() < Duration::from_secs(60));
}

#[test]
fn code_that_only_waits_has_failed() {
    for code in [
        "import select\nselect.select([], [], [], 999)",
        "import threading\nthreading.Event().wait()",
        "import os\nos.read(os.pipe()[0], 1)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    ] {
        let wall = Duration::from_secs(4);
        let result = limited(&format!("print('before', flush=True)\n{code}"), Limits { wall, ..Limits::default() });
        assert!(result.outcome.message().contains("waited without computing"), "{code}: {:?}", result.outcome);
        assert_eq!((result.outcome.kind(), result.stdout.as_str()), ("program_error", "before\n"), "{code}");
    }
    let waited = ok("import time\ntime.sleep(1000)");
    assert!(waited.usage.wall < Duration::from_secs(60), "waiting helps nothing and costs nothing");
}

#[test]
fn a_process_that_dies_is_started_again() {
    let mine = own_tool();
    for _ in 0..3 {
        let before = mine.processes();
        kill(before[0], libc::SIGKILL);
        mine.check().unwrap();
        assert_ne!(mine.processes(), before);
    }
}

#[test]
fn a_process_killed_in_the_middle_costs_no_call() {
    let mine = own_tool();
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..4)
            .map(|i| {
                let mine = &mine;
                let code = format!(
                    "import time\nend = time.monotonic() + 0.7\nwhile time.monotonic() < end: pass\nprint({i})"
                );
                scope.spawn(move || mine.run(ToolCall::new(code)).unwrap())
            })
            .collect();
        std::thread::sleep(Duration::from_millis(200));
        kill(mine.processes()[0], libc::SIGKILL);
        for (i, call) in calls.into_iter().enumerate() {
            let result = call.join().unwrap();
            assert_eq!((result.outcome, result.stdout), (Outcome::Ok, format!("{i}\n")));
        }
    });
}

#[test]
fn a_process_that_dies_whenever_it_is_called_is_an_error_soon() {
    let mine = own_tool();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                for pid in mine.processes() {
                    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let busy = "import time\nend = time.monotonic() + 5\nwhile time.monotonic() < end: pass";
        for _ in 0..3 {
            assert!(matches!(mine.run(ToolCall::new(busy)), Err(Error::Tool { .. })));
        }
        let e = mine.run(ToolCall::new("")).unwrap_err().to_string();
        assert!(e.contains("in a row"), "{e}");
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        killer.join().unwrap();
    });
}

#[test]
fn an_interpreter_without_the_modules_says_what_to_install() {
    let mut options = PythonOptions::default();
    options.search.python =
        ["/usr/bin/python3", "/bin/sh"].map(std::path::PathBuf::from).into_iter().find(|p| p.is_file());
    match PythonTool::new(options) {
        Err(Error::Tool { what, .. }) => assert!(what.contains("could not be started with /"), "{what}"),
        Err(e) => panic!("{e}"),
        Ok(tool) => assert!(tool.check().is_ok(), "this machine's python3 has the modules"),
    }
}

#[test]
fn an_interrupt_from_the_terminal_does_not_reach_the_process() {
    tool().check().unwrap();
    let group = unsafe { libc::getpgid(tool().processes()[0] as i32) };
    assert_ne!(group, unsafe { libc::getpgrp() }, "Ctrl-C goes to all of a group");
}

#[test]
fn dropping_the_tool_ends_its_processes() {
    let mine = own_tool();
    mine.check().unwrap();
    let pid = mine.processes()[0];
    drop(mine);
    assert_eq!(unsafe { libc::kill(pid as i32, 0) }, -1);
}
