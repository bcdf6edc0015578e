//! The `varft` binary: see `varft --help`.

fn main() {}
