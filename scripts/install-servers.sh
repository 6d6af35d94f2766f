#!/bin/sh
# Installs what the demo and the tests need and this machine lacks: the programs of
# PostgreSQL and Redis, and a C linker for Rust. No server is started, and servers
# that run already are not touched: Commitstream starts private ones of its own.
#
#   scripts/install-servers.sh [--dry-run] [--tests]
#       --dry-run: say what would be done
#       --tests: also what only tests need: Python's Redis client, Node's where there is npm, and
#                on Debian PgBouncer, promtool and Chromium, without which some of them are left out
set -eu

DRY_RUN=no
TESTS=no
for option in "$@"; do
    case $option in
    --dry-run) DRY_RUN=yes ;;
    --tests) TESTS=yes ;;
    *)
        echo "usage: scripts/install-servers.sh [--dry-run] [--tests]" >&2
        exit 2
        ;;
    esac
done

say() { printf '%s\n' "$*"; }
fail() {
    printf '%s\n' "$@" >&2
    exit 1
}
has() { command -v "$1" >/dev/null 2>&1; }

# The places where commitstream-sandbox looks, see crates/commitstream-sandbox/src/binaries.rs: change both together.
program_directories() {
    printf '%s\n' "$PATH" | tr ':' '\n'
    printf '%s\n' /opt/homebrew/bin /usr/local/bin /usr/bin
    for directory in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin \
        /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin; do
        printf '%s\n' "$directory"
    done
}

# Is there one directory with all of these programs?
has_together() {
    program_directories | (
        while read -r directory; do
            complete=yes
            for program in "$@"; do
                [ -x "$directory/$program" ] || complete=no
            done
            [ "$complete" = no ] || exit 0
        done
        exit 1
    )
}

missing_postgres() { ! has_together initdb postgres pg_basebackup; }
missing_psql() { ! has_together psql; }
missing_redis() { ! has_together redis-server || ! has_together redis-cli; }
missing_linker() { ! has cc; }

# The places where the test crates/commitstream/tests/it/python.rs looks: change both together.
VENV=target/python
missing_python() {
    [ "$TESTS" = yes ] || return 1
    for python in "$VENV/bin/python3" python3 /usr/bin/python3; do
        ! "$python" -c 'import redis' 2>/dev/null || return 1
    done
}

# Beside it the same test looks for Node's client.
NODE=target/node
missing_node() { [ "$TESTS" = yes ] && has node && has npm && [ ! -d "$NODE/node_modules/redis" ]; }

# PgBouncer is in /usr/sbin, which is not in everybody's PATH.
missing_pgbouncer() { [ "$TESTS" = yes ] && has apt-get && ! has pgbouncer && [ ! -x /usr/sbin/pgbouncer ]; }
missing_promtool() { [ "$TESTS" = yes ] && has apt-get && ! has promtool; }
# Ubuntu has it as a snap only.
missing_chromedriver() { [ "$TESTS" = yes ] && grep -qx 'ID=debian' /etc/os-release 2>/dev/null && ! has chromedriver; }

missing=
if missing_postgres; then missing="$missing PostgreSQL"; fi
if missing_psql; then missing="$missing psql"; fi
if missing_redis; then missing="$missing Redis"; fi
if missing_linker; then missing="$missing C-linker"; fi
if missing_python; then missing="$missing redis-py"; fi
if missing_pgbouncer; then missing="$missing PgBouncer"; fi
if missing_promtool; then missing="$missing promtool"; fi
if missing_chromedriver; then missing="$missing chromedriver"; fi

# apt-get with the package's usual habits held back: it would create a database cluster
# and start services. Both measures are undone at the end, also after a failure.
# This text runs as root.
# shellcheck disable=SC2016 # its variables are its own
APT_INSTALL='
set -eu
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
cluster=/etc/postgresql-common/createcluster.d/commitstream-install.conf
undo=
restore() { for file in $undo; do rm -f "$file"; done; }
trap restore EXIT
trap "exit 1" HUP INT TERM
if [ ! -e "$policy" ]; then
    undo="$undo $policy"
    printf "#!/bin/sh\nexit 101\n" >"$policy"
    chmod 755 "$policy"
fi
mkdir -p "${cluster%/*}"
undo="$undo $cluster"
echo "create_main_cluster = false" >"$cluster"
apt-get -q -q update
apt-get -q -q install -y --no-install-recommends "$@" >/dev/null
'

install_debian() {
    packages=
    if missing_postgres; then packages="$packages postgresql"; fi
    if missing_postgres || missing_psql; then packages="$packages postgresql-client"; fi
    if missing_redis; then packages="$packages redis-server redis-tools"; fi
    if missing_linker; then packages="$packages gcc libc6-dev"; fi
    if missing_python; then packages="$packages python3-redis"; fi
    if missing_pgbouncer; then packages="$packages pgbouncer"; fi
    if missing_promtool; then packages="$packages prometheus"; fi
    if missing_chromedriver; then packages="$packages chromium chromium-driver"; fi
    packages=${packages# }
    say "Installing with apt-get: $packages"
    [ "$DRY_RUN" = no ] || exit 0
    # shellcheck disable=SC2086 # one word for each package
    if [ "$(id -u)" = 0 ]; then
        sh -c "$APT_INSTALL" install $packages
    elif has sudo; then
        sudo sh -c "$APT_INSTALL" install $packages
    else
        fail "This needs root, and there is no sudo. As root, run:" \
            "  apt-get update && apt-get install -y --no-install-recommends $packages"
    fi
}

install_macos() {
    has brew || fail "Missing:$missing. Install Homebrew (https://brew.sh) and run this again, or install them yourself."
    if missing_linker; then
        fail "Missing: a C linker. Install Apple's command line tools with: xcode-select --install"
    fi
    packages=
    if missing_postgres || missing_psql; then packages="$packages postgresql@17"; fi
    if missing_redis; then packages="$packages redis"; fi
    if missing_python && ! has python3; then packages="$packages python@3.13"; fi
    packages=${packages# }
    say "Installing with Homebrew: ${packages:-nothing}"
    if missing_python; then say "Installing with pip, in $VENV: redis"; fi
    [ "$DRY_RUN" = no ] || exit 0
    # shellcheck disable=SC2086 # one word for each package
    [ -z "$packages" ] || brew install --quiet $packages
    if missing_python; then
        python3 -m venv "$VENV"
        "$VENV/bin/pip" install --quiet redis
    fi
}

# Systems on which nobody has tried this script: the command, and not more.
advise() {
    if has dnf; then
        command='dnf install postgresql-server postgresql redis gcc'
    elif has zypper; then
        command='zypper install postgresql-server postgresql redis gcc'
    elif has pacman; then
        command='pacman -S postgresql redis gcc'
    elif has apk; then
        command='apk add postgresql postgresql-client redis gcc musl-dev'
    else
        command=
    fi
    [ -z "$command" ] || fail "Missing:$missing. As root, run:" "  $command"
    fail "Missing:$missing." \
        "Install the server and client programs of PostgreSQL 13 or newer (initdb, postgres, psql)," \
        "Redis 6.2 or newer (redis-server, redis-cli) and a C linker (cc), so that they are in PATH."
}

if [ -n "$missing" ]; then
    if has apt-get; then
        install_debian
    elif [ "$(uname -s)" = Darwin ]; then
        install_macos
    else
        advise
    fi
    if missing_postgres || missing_psql || missing_redis || missing_linker || missing_python; then
        fail "The packages were installed, but some program still cannot be found. Missing before:$missing."
    fi
    say "What was missing is installed:$missing."
fi

if missing_node; then
    say "Installing with npm, in $NODE: redis"
    [ "$DRY_RUN" = yes ] || npm install --silent --no-audit --no-fund --prefix "$NODE" redis
fi

if ! has cargo && [ ! -x "${HOME:-/nonexistent}/.cargo/bin/cargo" ]; then
    fail "Rust is missing: install it from https://rustup.rs with" \
        "  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
fi
