#!/usr/bin/env bash
# Six nodes on one machine, a daemon and a rank each. Two of them are lost while they train, with their memory; two
# others take their places, and the run goes on from what the remaining four hold. `ckptd demo --nodes 6 --kill 2` does
# the same, and compares every bit with an undisturbed run.
#
#   examples/cluster.sh [NODES] [LOST]      ckptd and torch must be installed; a minute or two; leaves nothing behind
set -euo pipefail

nodes=${1:-6} lost=${2:-2} port=${PORT:-7100} # every daemon, and every start of the job, takes the next port
work=$(mktemp -d) memory=$(mktemp -d /dev/shm/ckptd-cluster-XXXXXX)
name=() daemon=() rank=() # by node
trap '{ kill -KILL "${rank[@]}" "${daemon[@]}"; wait; } 2>/dev/null; rm -rf "$work" "$memory"' EXIT
trap 'exit 130' INT TERM

serve() { # serve NODE NAME: a daemon with its own socket, memory and address, and no tier
  name[$1]=$2 port=$((port + 1))
  ckptd serve --socket "$work/$2.sock" --arena "$memory/$2" --memory 256MiB \
    --listen "127.0.0.1:$port" --insecure 2>"$work/$2.log" &
  daemon[$1]=$!
}

status() { # status NODE; its exit code 3 says that a run is at risk, which is no failure here
  ckptd status --socket "$work/${name[$1]}.sock" || (($? == 3))
}

ready() { # ready NODE: wait until its daemon answers
  until status "$1" &>"$work/answer"; do
    kill -0 "${daemon[$1]}" || { cat "$work/${name[$1]}.log" >&2; exit 1; }
    sleep 0.2
  done
}

train() { # a rank on every node; srun or torchrun would set the same variables
  port=$((port + 1))
  for ((n = 0; n < nodes; n++)); do
    RANK=$n WORLD_SIZE=$nodes LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port OMP_NUM_THREADS=1 \
      CKPTD_DAEMON="unix://$work/${name[n]}.sock" \
      python -m ckptd_client.examples.train_gpt gpt --steps 40 --protect "$((nodes - lost))+$lost" \
      2>>"$work/rank-$n.log" &
    rank[n]=$!
  done
}

say() { printf '\n== %s\n' "$*"; }

say "$nodes daemons, and a rank beside each"
for ((n = 0; n < nodes; n++)); do serve "$n" "node$n"; done
for ((n = 0; n < nodes; n++)); do ready "$n"; done
train
# RUN STATE INCARNATION RANKS HERE ("1/1 of 6") STAGED PROTECTED: the eighth word
until status 0 | awk '$1 == "gpt" && $8 + 0 >= 10 { found = 1 } END { exit !found }'; do
  kill -0 "${rank[0]}" || { cat "$work/rank-0.log" >&2; exit 1; }
  sleep 0.5
done
status 0

say "the last $lost are lost: daemons and ranks killed, their memory wiped; a launcher then ends the other ranks"
kill -KILL "${daemon[@]: -lost}" "${rank[@]: -lost}"
{ kill -KILL "${rank[@]}" || true; wait "${rank[@]}" "${daemon[@]: -lost}" || true; } 2>/dev/null
for ((n = nodes - lost; n < nodes; n++)); do rm -r "$memory/node$n"; done

say "others take their places, and the job starts again"
for ((n = nodes - lost; n < nodes; n++)); do serve "$n" "fresh$n"; done
for ((n = nodes - lost; n < nodes; n++)); do ready "$n"; done
train
for pid in "${rank[@]}"; do wait "$pid"; done
cd "$work" && grep "restored from" rank-*.log && grep "loss" rank-0.log
status 0
