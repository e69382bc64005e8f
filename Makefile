# Everything a contributor runs. `make test` and `make bench-quick` need Go and nothing else (the C library's tests are
# skipped without a C compiler, the Rust crates' without Cargo); `make test-race` needs a C compiler too, because the race detector does.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

GO      ?= go
# Modules whose tests are run. bench/ is only vetted: measuring is not testing.
TESTED  := . interop
MODULES := $(TESTED) $(if $(wildcard bench/go.mod),bench)

# More flags for go test, for example GOTESTFLAGS=-v or GOTESTFLAGS=-short.
GOTESTFLAGS ?=
TESTTIMEOUT ?= 15m
FUZZTIME    ?= 20s
# Systems that the root module must build for, GOOS/GOARCH.
CROSS ?= linux/arm64 darwin/arm64 windows/amd64 freebsd/amd64 android/arm64

# Tools run at a pinned version through the Go command: nothing is installed, nothing drifts.
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
DEPGUARD    := github.com/OpenPeeDeeP/depguard/v2/cmd/depguard@v2.3.0
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0

.PHONY: help
help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: test
test: ## Run every test: the module itself, interop against upstream's clients and servers, the C library, the Rust crates.
	@for m in $(TESTED); do echo "== go test ./... in $$m"; (cd $$m && $(GO) test -timeout $(TESTTIMEOUT) $(GOTESTFLAGS) ./...); done
	@$(MAKE) --no-print-directory test-c
	@$(MAKE) --no-print-directory test-rust

.PHONY: test-c
test-c: ## Build the C library and run its tests, in C and C++ (Linux with a C compiler).
	@if [ "$$(uname)" != Linux ]; then echo "cabi: C tests skipped: the C library is for Linux"; \
	elif ! command -v $(CC) >/dev/null; then echo "cabi: C tests skipped: there is no C compiler ($(CC))"; \
	else $(MAKE) --no-print-directory -C cabi test; fi

.PHONY: test-rust
test-rust: ## Run the tests of the Rust crates, on what test-c built (Linux with Cargo and a C compiler).
	@why=$$(rust/can) || { echo "rust: tests skipped: $$why"; exit 0; }; $(MAKE) --no-print-directory -C rust test

.PHONY: lint-rust
lint-rust: ## rustfmt, clippy and rustdoc, without a warning (Linux with Cargo and a C compiler).
	@why=$$(rust/can) || { echo "rust: lint skipped: $$why"; exit 0; }; $(MAKE) --no-print-directory -C rust lint

.PHONY: test-short
test-short: ## Run the tests of the module itself only, in short mode.
	$(GO) test -short -timeout $(TESTTIMEOUT) $(GOTESTFLAGS) ./...

.PHONY: test-race
test-race: ## Run the tests under the race detector (interop in short mode).
	$(GO) test -race -timeout $(TESTTIMEOUT) $(GOTESTFLAGS) ./...
	cd interop && $(GO) test -race -short -timeout $(TESTTIMEOUT) $(GOTESTFLAGS) ./...

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME (20s each).
	@FUZZTIME=$(FUZZTIME) GO=$(GO) .ci/fuzz $(TESTED)

.PHONY: cover
cover: ## Measure test coverage of the module itself; the profile is cover.out.
	$(GO) test -timeout $(TESTTIMEOUT) -coverpkg=./... -coverprofile=cover.out ./...
	$(GO) tool cover -func=cover.out | tail -n 1

.PHONY: bench
bench: ## Measure tailnode and upstream's tsnet side by side; table on stdout, JSON in bench.out.
	cd bench && $(GO) run . -json ../bench.out

.PHONY: bench-quick
bench-quick: ## The same in under three minutes, with wider error bars.
	cd bench && $(GO) run . -quick -json ../bench.out

.PHONY: bench-docs
bench-docs: ## Put the table and the chart of bench.out into docs/.
	cd bench && $(GO) run . -from ../bench.out -docs ../docs

.PHONY: lint
lint: fmt vet staticcheck imports ## gofmt, vet, staticcheck and the import rules.

.PHONY: fmt
fmt: ## Fail if a file is not gofmt's.
	@out=$$(gofmt -l $$(git ls-files '*.go' 2>/dev/null || find . -name '*.go')); \
	if [ -n "$$out" ]; then echo "not formatted:"; echo "$$out"; exit 1; fi

.PHONY: vet
vet: ## go vet in every module.
	@for m in $(MODULES); do echo "== go vet ./... in $$m"; (cd $$m && $(GO) vet ./...); done

.PHONY: staticcheck
staticcheck: ## staticcheck in every module.
	@for m in $(MODULES); do echo "== staticcheck ./... in $$m"; (cd $$m && $(GO) run $(STATICCHECK) ./...); done

.PHONY: imports
imports: ## The import rules of .depguard.yml, and proof that the linter still sees a violation.
	@test -f .depguard.yml
	$(GO) run $(DEPGUARD) ./...
	@GO=$(GO) DEPGUARD=$(DEPGUARD) .ci/imports-selftest

.PHONY: vuln
vuln: ## Known vulnerabilities, where the database can be reached.
	@GO=$(GO) GOVULNCHECK=$(GOVULNCHECK) .ci/vuln $(TESTED)

.PHONY: cross
cross: ## Build the module for every system of CROSS.
	@for t in $(CROSS); do echo "== build $$t"; CGO_ENABLED=0 GOOS=$${t%/*} GOARCH=$${t#*/} $(GO) build ./...; done

.PHONY: test-32bit
test-32bit: ## The tests of what counts in bytes and bits from outside, as a 32-bit program; needs an amd64 Linux.
	GOARCH=386 CGO_ENABLED=0 $(GO) test -short -timeout $(TESTTIMEOUT) $(addprefix ./internal/,derp disco dns filter lpm noise packet path stun tailcfg udp wg)
