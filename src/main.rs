//! The `varft` binary: see `varft --help`.

fn main() -> std::process::ExitCode {
    varft::cli::main()
}
