# Sourced by train_*.sh and eval_*.sh: finds the config, the GPUs and the nodes, and starts one command.
#   GPUS=N            processes on this node (default: the GPUs found; 1 process on the CPU if there is none)
#   NNODES=N          nodes (default 1); run the same script on each of them with
#   NODE_RANK=R       its number, from 0
#   MASTER_ADDR=HOST  the first node, MASTER_PORT=PORT (default 29500)
#   PYTHON=FILE       the interpreter (default: the active environment, else the one scripts/setup.sh made, else python3)
#   DRY_RUN=1         print the exact command, start nothing

ROOT="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="${VENV:-$ROOT/.venv}/bin/python"
    [[ -z "${VIRTUAL_ENV:-}" && -x "$PYTHON" ]] || PYTHON=python3
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

fail() { echo "$(basename "$0"): $*" >&2; exit 2; }

usage() {  # the comment block that opens the calling script
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
    exit "${1:-0}"
}

# find_config FOLDER NAME: a file as given, one in the repository, or a bare name from configs/FOLDER
find_config() {
    local candidate
    for candidate in "$2" "$ROOT/$2" "$ROOT/configs/$1/$2.yaml"; do
        if [[ -f "$candidate" ]]; then echo "$candidate"; return; fi
    done
    fail "no config $2. Known: $(cd "$ROOT/configs/$1" && ls -- *.yaml | sed 's/\.yaml$//' | tr '\n' ' ')"
}

count_gpus() {
    if [[ -n "${GPUS:-}" ]]; then echo "$GPUS"
    elif [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^ ]' || true
    elif command -v nvidia-smi >/dev/null; then nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else echo 0; fi
}

# set_launcher MODULE: LAUNCH becomes the command up to the flags of the package
set_launcher() {
    local gpus nodes="${NNODES:-1}"
    gpus="$(count_gpus)"
    [[ "$gpus" =~ ^[0-9]+$ ]] || fail "GPUS=$gpus is not a number"
    [[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$nodes is not a number of nodes"
    ((gpus > 0)) || gpus=1
    LAUNCH=("$PYTHON" -m torch.distributed.run)
    if ((nodes > 1)); then
        [[ -n "${NODE_RANK:-}" && -n "${MASTER_ADDR:-}" ]] ||
            fail "NNODES=$nodes needs NODE_RANK=0..$((nodes - 1)) and MASTER_ADDR=HOST on each node"
        LAUNCH+=("--nnodes=$nodes" "--node_rank=$NODE_RANK" "--nproc_per_node=$gpus"
            "--master_addr=$MASTER_ADDR" "--master_port=${MASTER_PORT:-29500}")
    elif ((gpus > 1)); then
        LAUNCH+=(--standalone --local-addr=127.0.0.1 "--nproc_per_node=$gpus") # its own name need not resolve
    else
        LAUNCH=("$PYTHON")
    fi
    LAUNCH+=(-m "$1")
}

# start COMMAND...: run it in place of this script, whose signals it then gets, or with DRY_RUN=1 print it
start() {
    if [[ -n "${DRY_RUN:-}" ]]; then printf '%q ' "$@"; echo; else exec "$@"; fi
}

# prepare MODULE FOLDER FLAG CONFIG ARGS...: set CONFIG, NAME and RUN, the command up to ARGS, with FLAG $DATA if set.
# Fails if neither DATA, the config nor ARGS names the data
prepare() {
    local module="$1" folder="$2" flag="$3" data=()
    (($# >= 4)) || usage 2 >&2
    [[ "$4" != -h && "$4" != --help ]] || usage
    CONFIG="$(find_config "$folder" "$4")"
    NAME="$(basename "${CONFIG%.yaml}")"
    shift 4
    if [[ -n "${DATA:-}" ]]; then
        [[ -n "${DRY_RUN:-}" || -e "$DATA" ]] || fail "DATA=$DATA: no such folder"
        data=("$flag" "$DATA")
    elif ! grep -q "^${flag#--}:" "$CONFIG" && [[ " $* " != *" $flag"* ]]; then
        fail "where is the data? DATA=DIR $(basename "$0") ... (or $flag DIR at the end)"
    fi
    set_launcher "$module"
    RUN=("${LAUNCH[@]}" --config "$CONFIG" ${data[@]+"${data[@]}"})
}

# train MODULE FOLDER DATA_FLAG CONFIG ARGS...
train() {
    prepare "$@"
    shift 4
    local output="${OUTPUT:-outputs/$NAME}" logs="${LOGS:-logs}" status=0
    RUN+=(--output_dir "$output" "$@")
    if [[ -n "${DRY_RUN:-}" || "${NODE_RANK:-0}" != 0 ]]; then start "${RUN[@]}"; return; fi
    mkdir -p "$output" "$logs"
    "${RUN[@]}" 2>&1 | tee -a "$logs/detail_$NAME.log" || status=$?
    if [[ -f "$output/log.txt" ]]; then cp "$output/log.txt" "$logs/log_$NAME.txt"; fi
    ((status == 0)) || exit "$status"
    echo "log: $logs/log_$NAME.txt, console: $logs/detail_$NAME.log, checkpoints: $output"
}

# evaluate MODULE FOLDER DATA_FLAG CONFIG [CHECKPOINT] ARGS...
evaluate() {
    prepare "$@"
    shift 4
    if [[ $# -gt 0 && "$1" != -* ]]; then
        [[ -n "${DRY_RUN:-}" || -f "$1" ]] || fail "no checkpoint $1"
        RUN+=(--resume "$1")
        shift
    elif [[ " $* " != *" --resume"* ]]; then
        RUN+=(--resume "$("$PYTHON" -m irpe_train.zoo "$CONFIG" ${DRY_RUN:+--where})")
    fi
    start "${RUN[@]}" --eval --output_dir "${OUTPUT:-outputs/eval_$NAME}" "$@"
}
