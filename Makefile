# make            what there is
# make demo       see it work, on a machine that has only Rust

# Rust is often installed without being in the PATH of a fresh shell.
CARGO ?= $(shell command -v cargo 2>/dev/null || { test -x "$$HOME/.cargo/bin/cargo" && echo "$$HOME/.cargo/bin/cargo"; } || echo cargo)

# make demo SECONDS=20 RATE=5000 DEMO_ARGS="..."
DEMO_OPTIONS = $(if $(SECONDS),--seconds $(SECONDS)) $(if $(RATE),--rate $(RATE)) $(DEMO_ARGS)
# make chaos SECONDS=600 SEED=42
CHAOS_OPTIONS = COMMITSTREAM_CHAOS_SECONDS=$(or $(SECONDS),60) COMMITSTREAM_CHAOS_SEED=$(SEED)
# make bench BENCH_ARGS="drain --retention 0"; a whole run is written into docs
BENCH_DOCS = $(if $(filter-out --all,$(BENCH_ARGS)),,--markdown docs/benchmarks.md --svg docs/benchmarks.svg)
# make test TEST_ARGS="-p commitstream some_test"
TEST_ARGS ?= --workspace
# Much of the tests' time goes into files that PostgreSQL makes and removes. With the data of their servers in memory, where there is plenty, and two
# tests for each processor they take a third less.
TEST_THREADS ?= $(shell echo $$(( 2 * $$(getconf _NPROCESSORS_ONLN) )))
TEST_DATA ?= $(shell awk '/^MemAvailable/ { plenty = $$2 > 12582912 } END { exit !plenty }' /proc/meminfo 2>/dev/null && \
	df -Pk /dev/shm | awk 'END { if ($$4 > 8388608) print "/dev/shm" }')
TEST_ENVIRONMENT = RUST_TEST_THREADS=$(TEST_THREADS) $(if $(TEST_DATA),COMMITSTREAM_SANDBOX_DIR=$(TEST_DATA))

.DEFAULT_GOAL := help
.PHONY: help demo bench test screenshots chaos lint clean

help: ## list the targets
	@echo "Commitstream: transactional events from PostgreSQL to Redis Streams."
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: ## see it work: PostgreSQL, Redis, the example service, a relay (SECONDS=, RATE=, DEMO_ARGS=)
	@scripts/install-servers.sh
	@echo "Building commitstream (the first time takes a few minutes) ..."
	@$(CARGO) build --release --quiet -p commitstream-cli
	@$(CARGO) run --release --quiet -p commitstream-cli --bin commitstream -- demo $(DEMO_OPTIONS)

bench: ## measure the speed beside baselines: under ten minutes, or forty with BENCH_ARGS=--all (BENCH_ARGS=)
	@scripts/install-servers.sh
	@echo "Building commitstream (the first time takes a few minutes) ..."
	@$(CARGO) build --release --quiet -p commitstream-cli
	@$(CARGO) run --release --quiet -p commitstream-cli --bin commitstream -- bench $(BENCH_ARGS) $(BENCH_DOCS)

test: ## run all tests against a throwaway PostgreSQL and Redis (TEST_ARGS=)
	@scripts/install-servers.sh --tests
	@echo "Building the tests ..."
	@$(CARGO) test --quiet --no-run $(TEST_ARGS)
	@echo "Running the tests against a private PostgreSQL and Redis ..."
	@$(TEST_ENVIRONMENT) $(CARGO) run --quiet -p commitstream-sandbox -- exec -- $(CARGO) test $(TEST_ARGS)

screenshots: ## take the pictures in docs/console of the console under load
	@scripts/install-servers.sh --tests
	@echo "Building (the first time takes a few minutes) ..."
	@$(CARGO) test --release --quiet --no-run -p commitstream-cli --test browser
	@echo "Letting events flow for a minute, against a private PostgreSQL and Redis ..."
	@$(CARGO) test --release --quiet -p commitstream-cli --test browser -- --ignored screenshots

chaos: ## run the randomised fault test; it prints its seed (SECONDS=, SEED=)
	@scripts/install-servers.sh
	@echo "Building the test (the first time takes a few minutes) ..."
	@$(CARGO) test --release --quiet --no-run -p commitstream-cli --test chaos
	@$(CHAOS_OPTIONS) $(CARGO) test --release --quiet -p commitstream-cli --test chaos -- --nocapture nothing_is_lost

lint: ## check format and lints; any warning fails
	@echo "Checking the format ..."
	@$(CARGO) fmt --all -- --check
	@echo "Checking the lints ..."
	@$(CARGO) clippy --quiet --workspace --all-targets -- -D warnings

clean: ## remove everything that was built
	@echo "Removing what was built ..."
	@$(CARGO) clean --quiet
