//! `varft doctor`.

use super::{stderr, stdout, varft};
use std::process::Command;

#[test]
fn doctor_says_where_it_hurts() {
    let o = Command::new(env!("CARGO_BIN_EXE_varft"))
        .args(["doctor", "--dir", "/proc/nothing"])
        .env("VARFT_PYTHON", "/no/such/python")
        .output()
        .unwrap();
    assert_eq!(o.status.code(), Some(1), "{}", stdout(&o));
    assert!(stdout(&o).lines().any(|l| l.starts_with("fail  disk") && l.contains("--dir")), "{}", stdout(&o));
    assert!(
        stdout(&o).lines().any(|l| l.starts_with("warn  python") && l.contains("/no/such/python")),
        "{}",
        stdout(&o)
    );
    assert!(stderr(&o).contains("disk"), "{}", stderr(&o));
    let empty = tempfile::tempdir().unwrap();
    let o = Command::new(env!("CARGO_BIN_EXE_varft"))
        .args(["doctor", "--dir", "/proc/nothing"])
        .env("XDG_CACHE_HOME", empty.path())
        .env_remove("VARFT_PYTHON")
        .env_remove("VARFT_NO_INSTALL")
        .env_remove("VIRTUAL_ENV")
        .output()
        .unwrap();
    let out = stdout(&o);
    let python = out.lines().find(|l| l.starts_with("warn  python")).unwrap_or_else(|| panic!("{out}"));
    assert!(python.contains("varft doctor --install") && !python.contains("VARFT_NO_INSTALL"), "{python}");
    for check in ["cores", "simd", "memory", "kernels", "python"] {
        assert!(out.lines().any(|l| l.split_whitespace().nth(1) == Some(check)), "{out}");
    }
}

#[test]
fn doctor_plans_the_memory_of_the_published_sizes_and_of_a_model_of_ones_own() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("mine").to_str().unwrap().to_string();
    assert!(varft(&["init", "tiny", &model]).status.success());
    let o =
        varft(&["doctor", "--dir", dir.path().to_str().unwrap(), "--model", &model, "--set", "optim.masters=false"]);
    let said = stdout(&o);
    let plan = said.split_once("\nmemory of varft train").unwrap_or_else(|| panic!("{said}")).1;
    let cells = |row: &str| -> Vec<String> {
        let line = plan.lines().find(|l| l.starts_with(row)).unwrap_or_else(|| panic!("no {row}: {said}"));
        line[17..].split_whitespace().map(str::to_owned).collect()
    };
    let columns = cells("weights").len();
    assert!(columns == 3 || columns == 9, "a card, or the host and two cards: {said}");
    assert_eq!(cells("model").iter().filter(|c| *c == "mine").count(), columns / 3);
    assert!(!plan.contains("\nmasters"), "{said}");
    assert!(cells("fits").iter().all(|c| c == "yes" || c == "no") && cells("in all").len() == columns);
    assert!(said.lines().any(|l| l.split_whitespace().nth(1) == Some("cuda")), "{said}");
    for (args, part) in
        [(["--model", "/no/such/model"], "no such folder"), (["--set", "optim.master=false"], "optim.masters")]
    {
        let o = varft(&[&["doctor"][..], &args].concat());
        assert!(o.status.code() == Some(1) && stderr(&o).contains(part), "{}", stderr(&o));
    }
}
