# The commands of this project. `make help` lists them; each does its own set-up, so that a fresh
# Debian machine with git, make and rustup's cargo needs nothing else.

MUSL := x86_64-unknown-linux-musl
TARGET := $(or $(CARGO_TARGET_DIR),target)
IMAGE := $(TARGET)/image
SUPVM := $(TARGET)/$(MUSL)/release/supvm
GUEST_INIT := $(TARGET)/$(MUSL)/release/guest-init
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/supvm
DENY_VERSION := $(shell sed -n 's/^cargo_deny_version=//p' setup.sh)
DENY := $(CACHE)/cargo-deny-$(DENY_VERSION)/bin/cargo-deny

.PHONY: help setup build images run test fuzz bench advisories clean

help: ## Lists the commands.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: ## Installs what this machine still lacks (Debian packages, Rust target, cargo-deny, cargo-fuzz).
	@./setup.sh

build: setup ## Builds the programs, static where they go into an image.
	cargo build --release -p client -p image-builder -p qemu-test
	cargo build --release --target $(MUSL) -p hypervisor -p guest-init

images: build ## Builds the images; what takes minutes is cached outside the checkout.
	$(TARGET)/release/image-builder all --supvm $(SUPVM) --guest-init $(GUEST_INIT) --out $(IMAGE)

run: images ## Boots the appliance, runs a few commands in a VM, powers off.
	$(TARGET)/release/qemu-test demo

test: setup ## Formatting, lints, unit tests, end-to-end scenarios.
	@.ci/test.sh

fuzz: setup ## Fuzzes every decoder for an hour (FUZZ_SECONDS=3600).
	@.ci/fuzz.sh $(or $(FUZZ_SECONDS),3600)

bench: images ## Measures; prints the tables of docs/performance.md.
	@./setup.sh bench
	cargo run --release --quiet -p guest-init --example speed
	TMPDIR=/dev/shm cargo bench --quiet -p client --bench speed
	cargo run --release --quiet --target $(MUSL) -p proxy --example gateway-speed
	cargo run --release --quiet --target $(MUSL) -p proxy --example edge-speed
	peer=$$($(TARGET)/release/image-builder peer-qemu) && \
	    $(TARGET)/release/qemu-test bench --peer "$$peer/peer-qemu.cpio"

advisories: setup ## Asks the advisory database about our dependencies (needs the network).
	$(DENY) check advisories

clean: ## Ends a running appliance and removes build output (not the cache).
	@if [ -x $(TARGET)/release/qemu-test ]; then $(TARGET)/release/qemu-test down; fi
	cargo clean
