# The guard: the parent of one sandbox server, and the owner of its directory.
#
#   sh -c 'eval "$COMMITSTREAM_GUARD"' commitstream-guard DIRECTORY STOP_SIGNAL
#
# It reads commands from standard input, one a line, and answers each with one
# line. The end of input means that the process which started the guard has
# gone, in whichever way: an orderly exit, a panic, Ctrl-C or SIGKILL. The
# guard then stops the server, removes the directory, and ends.

# shellcheck disable=SC2046,SC2086 # lists of process ids are meant to be split
# shellcheck disable=SC2034 # fields that are only skipped

# Ctrl-C and a closing terminal are for the process that started us. We outlive
# it by a moment on purpose, so a broken pipe must not end us either. To the
# server, a file that may not grow (`prlimit --fsize`) is a full disk and not its end.
trap '' INT HUP TERM QUIT PIPE XFSZ
unset COMMITSTREAM_GUARD
umask 077

directory=$1
stop_signal=$2
server=
log=$directory/server.log

if ! problem=$(mkdir -- "$directory" 2>&1); then
    printf 'failed %s\n' "$problem"
    exit 1
fi
exec 2>>"$log"
printf 'ready\n'

# Is the server running? `jobs` makes the shell collect an ended child: without
# that, a zombie would pass for a running server.
alive() {
    [ -n "$server" ] || return 1
    jobs >/dev/null 2>&1
    kill -0 "$server" 2>/dev/null && return 0
    server=
    return 1
}

# Does the state letter of this process match the pattern?
state_is() {
    state=
    if [ -r "/proc/$2/stat" ]; then
        read -r stat_pid stat_name state stat_rest <"/proc/$2/stat"
    else
        state=$(ps -o state= -p "$2")
    fi
    case $state in
    $1*) return 0 ;;
    *) return 1 ;;
    esac
}

# Has this process ended? One that only waits to be collected counts as ended.
gone() {
    ! kill -0 "$1" 2>/dev/null || state_is Z "$1"
}

# The server and its children. PostgreSQL's backends leave the process group of
# their parent, so a signal to the group would miss them.
family() {
    if [ -r "/proc/$server/task/$server/children" ]; then
        printf '%s %s' "$server" "$(cat "/proc/$server/task/$server/children")"
    else
        printf '%s %s' "$server" "$(ps -A -o ppid= -o pid= | awk -v parent="$server" '$1 == parent { print $2 }')"
    fi
}

# Stops the server and waits until it has stopped: a signal may arrive after `kill`
# returns, and only a stopped server starts no child behind our back.
freeze() {
    kill -s STOP "$server"
    tries=0
    until state_is '[TtZ]' "$server" || [ "$tries" -ge 500 ]; do
        tries=$((tries + 1))
        sleep 0.01
    done
}

pause() {
    freeze
    kill -s STOP $(family)
}

# SIGKILL for all of it at once, as a power cut would do; returns when it has ended.
destroy() {
    alive || return 0
    freeze
    members=$(family)
    kill -s KILL $members
    tries=0
    for member in $members; do
        until gone "$member" || [ "$tries" -ge 500 ]; do
            tries=$((tries + 1))
            sleep 0.01
        done
    done
    wait "$server"
    server=
}

# An orderly end; after 10 seconds, SIGKILL. The signal is repeated, since a Redis
# that has just become a replica refuses to end for a moment and forgets it.
stop() {
    alive || return 0
    kill -s CONT $(family)
    tries=0
    while alive && [ "$tries" -lt 500 ]; do
        [ $((tries % 25)) != 0 ] || kill -s "$stop_signal" "$server"
        tries=$((tries + 1))
        sleep 0.02
    done
    destroy
}

while read -r command argument; do
    case $command in
    prepare) # run a command to its end
        (eval "$argument") </dev/null >>"$log" 2>&1
        printf 'exit %s\n' "$?"
        ;;
    start)
        eval "exec $argument" </dev/null >>"$log" 2>&1 &
        server=$!
        printf 'pid %s\n' "$server"
        ;;
    alive) if alive; then printf 'yes\n'; else printf 'no\n'; fi ;;
    stop) stop && printf 'done\n' ;;
    kill) destroy && printf 'done\n' ;;
    # A child that has just ended makes `kill` fail, and that is no failure.
    pause)
        ! alive || pause
        printf 'done\n'
        ;;
    resume)
        ! alive || kill -s CONT $(family)
        printf 'done\n'
        ;;
    esac
done

stop
# A killed PostgreSQL leaves a small System V segment behind, named in the
# seventh line of its lock file; an orderly stop removes both.
if [ -r "$directory/data/postmaster.pid" ]; then
    sed -n 7p "$directory/data/postmaster.pid" | {
        read -r segment_key segment && ipcrm -m "$segment"
    }
fi
exec 2>/dev/null
tries=0
until rm -rf -- "$directory" || [ "$tries" -ge 100 ]; do
    tries=$((tries + 1))
    sleep 0.02
done
