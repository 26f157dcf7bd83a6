#!/bin/bash
# Two machines that share a disk train the toy together; one process of the second one is killed.
#
#     sudo benchmarks/two_machines.sh [arguments of pretrain.py]
#
# The machines are two network namespaces of this one (Linux), each with its own address, joined by
# a virtual cable.
set -eu
cd "$(dirname "$0")/.."
out=runs/two-machines
rm -rf "$out"

trap 'kill $(jobs -p) 2>/dev/null || true; ip netns del machine1; ip netns del machine2' EXIT
for n in 1 2; do
    ip netns add "machine$n"
done
ip link add eth0 netns machine1 type veth peer name eth0 netns machine2
for n in 1 2; do
    ip -n "machine$n" address add "10.77.0.$n/24" dev eth0
    ip -n "machine$n" link set lo up
    ip -n "machine$n" link set eth0 up
done

# Namespaces share one host name, so torchrun must be given its address (--local-addr) and which of
# the two hosts the rendezvous (is_host). Real machines need neither.
start() {
    GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
    ip netns exec "machine$1" python -m torch.distributed.run --nnodes 2 --nproc-per-node 1 \
        --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29400 --rdzv-id toy \
        --local-addr "10.77.0.$1" --rdzv-conf "is_host=$((2 - $1))" \
        pretrain.py --out "$out" --steps 200 --save-every 20 --log-every 10 --knn-every 100 "${@:2}"
}
start 1 "$@" & first=$!
start 2 "$@" & second=$!

until [ "$(grep -c '"loss"' "$out/metrics.jsonl" 2>/dev/null)" -ge 9 ] 2>/dev/null; do
    kill -0 $first $second
    sleep 0.2
done
last=$(grep '"loss"' "$out/metrics.jsonl" | tail -n 1)
echo "--- killing the process of the second machine after $last"
ip netns pids machine2 | xargs -n 1 ps -o pid=,args= -p | grep -v distributed.run |
    awk '/pretrain.py/ {print $1}' | xargs kill -9
wait $first
wait $second
count=$(grep -c '"loss"' "$out/metrics.jsonl")
last=$(grep '"loss"' "$out/metrics.jsonl" | tail -n 1)
echo "--- both machines ended well; the log has $count lines of training, the last: $last"
