#!/bin/sh
# Run inside a guest by `vtpm exec`: starts tcsd on the guest's tpm0 and then a script beside it.
#   trousers_session.sh DIRECTORY PORT SCRIPT
# DIRECTORY gets tcsd's configuration, store and log. tcsd wants its configuration owned by root:tss
# with mode 0640, and drops the variables that name a socket as its TPM unless it is given -e.
set -eu
directory=$1 port=$2 script=$3
{
    sed -e '/^[[:space:]]*port/d' -e '/^[[:space:]]*system_ps_file/d' /etc/tcsd.conf
    echo "port = $port"
    echo "system_ps_file = $directory/system.data"
} >"$directory/tcsd.conf"
chown root:tss "$directory/tcsd.conf"
chmod 0640 "$directory/tcsd.conf"
tcsd -e -f -c "$directory/tcsd.conf" >"$directory/tcsd.log" 2>&1 &
tcsd=$!
trap 'kill $tcsd; wait $tcsd || true' EXIT
export TSS_TCSD_PORT="$port"
# Its log is written only when it ends, so a tool tells when it is ready.
deadline=$(($(date +%s) + 20))
until tpm_version >/dev/null 2>&1; do
    if ! kill -0 $tcsd || [ "$(date +%s)" -ge $deadline ]; then
        cat "$directory/tcsd.log" >&2
        exit 69
    fi
done
sh "$script"
