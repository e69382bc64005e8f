//! Finds libtailnode: $TAILNODE_LIB_DIR, then pkg-config, else builds it from source with Go and a C compiler.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{exit, Command};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for v in ["TAILNODE_LIB_DIR", "TAILNODE_LINK", "TAILNODE_NO_PKG_CONFIG", "TAILNODE_SRC", "DOCS_RS", "GO"] {
        println!("cargo:rerun-if-env-changed={v}");
    }
    println!("cargo:rustc-check-cfg=cfg(tailnode_static_core)");
    if var("DOCS_RS").is_some() {
        return; // documentation links nothing
    }
    let os = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if os != "linux" {
        fail(&format!("libtailnode is for Linux only, not for {os}."));
    }
    let core = env::var_os("CARGO_FEATURE_CORE").is_some();
    if let Some(dir) = var("TAILNODE_LIB_DIR") {
        return from_dir(Path::new(&dir), core);
    }
    if var("TAILNODE_NO_PKG_CONFIG").is_none() {
        // The shared library; it finds the core beside itself at run time.
        if pkg_config::Config::new().atleast_version("0.1").probe("tailnode").is_ok() {
            return;
        }
    }
    from_source(core);
}

/// A variable of the environment that is set to something.
fn var(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|v| !v.is_empty())
}

/// A directory with libtailnode.a and libtailnode-core.a, or libtailnode.so.
fn from_dir(dir: &Path, core: bool) {
    let (client, go) = (dir.join("libtailnode.a"), dir.join("libtailnode-core.a"));
    let shared = dir.join("libtailnode.so");
    let dynamic = env::var("TAILNODE_LINK").is_ok_and(|v| v == "dynamic");
    if !dynamic && client.exists() && (!core || go.exists()) {
        println!("cargo:rerun-if-changed={}", client.display());
        if core {
            println!("cargo:rerun-if-changed={}", go.display());
        }
        link_static(dir, core);
    } else if shared.exists() {
        println!("cargo:rustc-link-search=native={}", dir.display());
        println!("cargo:rustc-link-lib=dylib=tailnode");
    } else {
        fail(&format!(
            "TAILNODE_LIB_DIR is {}, which holds neither {} nor libtailnode.so.",
            dir.display(),
            if core { "libtailnode.a with libtailnode-core.a" } else { "libtailnode.a" }
        ));
    }
}

fn link_static(dir: &Path, core: bool) {
    println!("cargo:rustc-link-search=native={}", dir.display());
    println!("cargo:rustc-link-lib=static=tailnode");
    if core {
        println!("cargo:rustc-link-lib=static=tailnode-core");
        println!("cargo:rustc-cfg=tailnode_static_core");
    }
    for l in ["pthread", "dl", "resolv"] {
        println!("cargo:rustc-link-lib=dylib={l}");
    }
}

fn from_source(core: bool) {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("OUT_DIR"));
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("CARGO_MANIFEST_DIR"));
    let root = match var("TAILNODE_SRC") {
        Some(p) => PathBuf::from(p),
        // A checkout has the source two levels up; the published crate carries it.
        None => [here.join("../.."), here.join("source")]
            .into_iter()
            .find(|p| p.join("cabi/include/tailnode.h").exists())
            .unwrap_or_else(|| here.join("source")),
    };
    let cabi = root.join("cabi");
    if !cabi.join("include/tailnode.h").exists() {
        fail(&format!("no libtailnode was found, and its source is not in {} (TAILNODE_SRC).\n{WAYS}", root.display()));
    }
    for p in
        ["cabi/src", "cabi/include", "cabi/core", "cabi/main.go", "cabi/signals.c", "cabi/fork.c", "cabi/archive.ld", "internal", "go.mod"]
    {
        println!("cargo:rerun-if-changed={}", root.join(p).display());
    }
    for e in std::fs::read_dir(&root).into_iter().flatten().flatten() {
        if e.path().extension().is_some_and(|x| x == "go") {
            println!("cargo:rerun-if-changed={}", e.path().display());
        }
    }
    let go = core.then(find_go); // what is missing is told before anything is built
    let mut sources: Vec<PathBuf> = std::fs::read_dir(cabi.join("src"))
        .unwrap_or_else(|e| fail(&format!("{}: {e}", cabi.join("src").display())))
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|x| x == "c"))
        .collect();
    sources.sort();
    let mut cc = cc::Build::new();
    cc.files(sources).std("gnu11").flag("-fvisibility=hidden").flag("-pthread").cargo_metadata(false);
    cc.compile("tailnode");
    if let Some(go) = go {
        build_core(&go, &cabi, &out, &cc);
    }
    link_static(&out, core);
}

/// The Go command.
fn find_go() -> OsString {
    let go = var("GO").unwrap_or_else(|| "go".into());
    if !Command::new(&go).arg("version").output().is_ok_and(|o| o.status.success()) {
        fail(&format!(
            "no libtailnode was found, and Go, which builds it, is not installed (it was looked for as $GO, then `go`).\n{WAYS}"
        ));
    }
    go
}

fn build_core(go: &OsString, cabi: &Path, out: &Path, cc: &cc::Build) {
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let goarch = match arch.as_str() {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "arm" => "arm",
        "riscv64" => "riscv64",
        _ => fail(&format!("the Go core is not built for {arch} here; build it and set TAILNODE_LIB_DIR.")),
    };
    let (parts, object) = (out.join("core-parts.a"), out.join("core-parts.o"));
    let status = Command::new(go)
        // As in cabi/Makefile, so that it is the same core: goroutines are not preempted by SIGURG in a host's process.
        .args([
            "build",
            "-trimpath",
            "-buildvcs=false",
            "-ldflags=-s -w -X runtime.godebugDefault=asyncpreemptoff=1",
            "-buildmode=c-archive",
            "-o",
        ])
        .arg(&parts)
        .arg(".")
        .current_dir(cabi)
        .env("CGO_ENABLED", "1")
        .env("GOOS", "linux")
        .env("GOARCH", goarch)
        .env("CC", cc.get_compiler().path())
        .status();
    match status {
        Ok(s) if s.success() => {}
        Ok(s) => fail(&format!("`go build` of the core in {} failed ({s}); its words are above.", cabi.display())),
        Err(e) => fail(&format!("`go build` cannot be run: {e}")),
    }
    // One object, in which the runtime's start has nothing of the program's around it.
    let linked = cc
        .get_compiler()
        .to_command()
        .args(["-r", "-nostdlib", "-Wl,--build-id=none", "-Wl,--whole-archive"])
        .arg(format!("-Wl,-T,{}", cabi.join("archive.ld").display()))
        .arg(&parts)
        .arg("-o")
        .arg(&object)
        .status();
    if linked.is_ok_and(|s| s.success()) {
        cc::Build::new().object(&object).cargo_metadata(false).compile("tailnode-core");
    } else {
        println!("cargo:warning=the core's objects cannot be linked into one by this linker: constructors of the program may run with signals blocked");
        std::fs::copy(&parts, out.join("libtailnode-core.a")).unwrap_or_else(|e| fail(&format!("{}: {e}", parts.display())));
    }
}

const WAYS: &str = "Do one of these:\n\
     - install Go 1.26 or newer: https://go.dev/dl/\n\
     - build the library elsewhere (`make -C cabi`) and set TAILNODE_LIB_DIR to its directory\n\
     - install it (`make -C cabi install`), so that pkg-config finds `tailnode`\n\
     - do without the core in this program: default-features = false, and isolated mode";

fn fail(why: &str) -> ! {
    eprintln!("\ntailnode-sys: {why}\n");
    exit(1)
}
