#!/usr/bin/env bash
# Qwen 3, tiny: node 1 (node-1), by FlagScale from the plan of the run.
set -euo pipefail
FLAGSCALE_NODE_RANK=1
: "${FLAGSCALE_RUN_DIR:?set it to a folder for logs and files}"
FLAGSCALE_ADDRESSES=(10.0.0.1 10.0.0.2 10.0.0.3)
: "${FLAGSCALE_PORT_RENDEZVOUS:?set it to a free port of node-0}"
: "${FLAGSCALE_PORT_WEB:=8000}"
: "${TOKEN:?secret: set it in the environment}"
mkdir -p "$FLAGSCALE_RUN_DIR"/{logs,ends}
mkdir -p "$(dirname "$FLAGSCALE_RUN_DIR"/conf/a.txt)"
printf '%s' 'port: '"${FLAGSCALE_PORT_RENDEZVOUS}"'
'"'"'quoted'"'"'
' > "$FLAGSCALE_RUN_DIR"/conf/a.txt
pids=() names=() kinds=() is_asked=
end_all() { is_asked=1; kill -INT "${pids[@]}" 2>/dev/null || true; }
trap end_all TERM INT
note() {   # no command substitution from here on: bash 5.2 loses a signal that falls into one
  { "${@:2}"; date +%s.%N; } > "$FLAGSCALE_RUN_DIR/ends/.$1"
  mv "$FLAGSCALE_RUN_DIR/ends/.$1" "$FLAGSCALE_RUN_DIR/ends/$1"
}
begun() {
  pids+=("$1") names+=("$2") kinds+=("${3-}")
  note "$2.begun" uname -n
  [ -z "$is_asked" ] || end_all   # asked before this one was there
}
wait_for_all() {
  local first=0 code i
  while ((${#pids[@]})); do
    wait -n 2>/dev/null || true   # something ended, or a signal came
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      code=0; wait "${pids[i]}" || code=$?   # -1 where a signal fell into the wait: unknown
      note "${names[i]}" echo "$code"
      if [ "$code${kinds[i]}$is_asked" = 0service ]; then
        echo "${names[i]}: exited with code 0, although nobody had stopped it" >&2; code=1
      fi
      unset "pids[i]" "names[i]" "kinds[i]"
      if ((code && !first)); then first=$code; ((${#pids[@]})) && end_all; fi
    done
  done
  exit "$first"
}
case "$FLAGSCALE_NODE_RANK" in
0|1|2)
(
  export A='it'"'"'s $HOME'
  export EVENTS="${FLAGSCALE_RUN_DIR}"/events
  cd '/work dir'
  exec python3 \
    -m \
    torch.distributed.run \
    --node-rank="${FLAGSCALE_NODE_RANK}" \
    --master-addr="${FLAGSCALE_ADDRESSES[0]}" \
    --master-port="${FLAGSCALE_PORT_RENDEZVOUS}" \
    --local-addr="${FLAGSCALE_ADDRESSES[FLAGSCALE_NODE_RANK]}" \
    '--json={"a": "$(x)"}' \
    '{run_dir}'
) >> "$FLAGSCALE_RUN_DIR"/logs/train-"${FLAGSCALE_NODE_RANK}".log 2>&1 < /dev/null &
begun $! train-"${FLAGSCALE_NODE_RANK}"
;;
esac
wait_for_all
