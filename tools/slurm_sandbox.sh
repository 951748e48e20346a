#!/usr/bin/env bash
# A real SLURM on one machine, for tests and for trying a job script: munged, slurmctld and a slurmd for every node.
#
#   tools/slurm_sandbox.sh start     start it; does nothing when it runs
#   eval "$(tools/slurm_sandbox.sh env)"      then sbatch, srun, squeue, scancel, sinfo work in this shell
#   tools/slurm_sandbox.sh status    a line for every daemon and node; exit code 0 when all are up
#   tools/slurm_sandbox.sh stop      cancel its jobs, end its daemons; the folder stays, with the logs
#
# Environment (default):
#   SLURM_SANDBOX_DIR     folder of this sandbox, own or new (/tmp/slurm-sandbox.<uid>); several may run beside each other
#   SLURM_SANDBOX_NODES   nodes (2), called n0, n1, ...
#   SLURM_SANDBOX_CPUS    CPUs a node claims (2), also more than there are
#   SLURM_SANDBOX_MEM     MiB a node claims (2048)
#   SLURM_SANDBOX_GPUS    GPUs a node claims (0), so that a script with --gres=gpu:8 is accepted; there is nothing behind them
#   SLURM_SANDBOX_TIMEOUT seconds of silence after which a node is down (60); a busy machine needs more than a few
#   SLURM_SANDBOX_PORT    first of nodes + 1 ports on 127.0.0.1 (a free block)
#
# Needs root, because slurmd starts jobs as their users, and Debian's packages munge slurmctld slurmd slurm-client
# (tried: Debian 12, SLURM 22.05.8). No systemd, cgroups, database or /etc/slurm; all daemons listen on 127.0.0.1 only.
set -euo pipefail

DIR=${SLURM_SANDBOX_DIR:-/tmp/slurm-sandbox.$(id -u)}
NODES=${SLURM_SANDBOX_NODES:-2}
CPUS=${SLURM_SANDBOX_CPUS:-2}
MEM=${SLURM_SANDBOX_MEM:-2048}
GPUS=${SLURM_SANDBOX_GPUS:-0}
TIMEOUT=${SLURM_SANDBOX_TIMEOUT:-60}
PACKAGES="munge slurmctld slurmd slurm-client"
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$DIR/slurm.conf
unset SLURM_JOB_ID SLURM_JOBID # also where the caller is a job itself

die() {
  echo "slurm_sandbox: $*" >&2
  exit 2
}

# ------------------------------------------------------------------ daemons
node_names() {
  local i
  for ((i = 0; i < $1; i++)); do echo "n$i"; done
}

daemons() { # of the sandbox in DIR, which may have another number of nodes than this call would start
  local nodes=$NODES
  [[ ! -s $DIR/nodes ]] || nodes=$(<"$DIR/nodes")
  node_names "$nodes" | sed 's/^/slurmd-/'
  echo slurmctld
  echo munged
}

# The pid of a daemon of ours, or nothing. The number in a pid file may meanwhile belong to another process: ours has DIR in its
# command line, and nothing else is ever signalled.
pid_of() {
  local pid
  pid=$(tr -dc 0-9 2>/dev/null <"$DIR/run/$1.pid") || return 0
  if [[ -n $pid ]] && tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- "$DIR/"; then echo "$pid"; fi
}

is_up() {
  local daemon
  for daemon in $(daemons); do [[ -n $(pid_of "$daemon") ]] || return 1; done
  timeout 10 scontrol ping >/dev/null 2>&1
}

nodes_are_ready() { # every node has a line for each of its partitions
  (($(sinfo --noheader --Node --format='%N %t' | sort -u | grep -cE ' (idle|mix|alloc|comp)$') == NODES))
}

wait_until() { # seconds, what, command ...
  local tries=$(($1 * 10)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    ((tries-- > 0)) || {
      tail -n 5 "$DIR"/log/*.log >&2 || true
      die "$what did not come up; logs in $DIR/log"
    }
    sleep 0.1
  done
}

# ------------------------------------------------------------------ configuration
free_ports() { # the first of NODES + 1 ports on which nothing listens
  local used first port
  used=" $(awk '$4 == "0A" {split($2, address, ":"); print address[2]}' /proc/net/tcp /proc/net/tcp6 2>/dev/null |
    while read -r hex; do printf '%d ' "0x$hex"; done)"
  for ((first = 26817; first < 32000; first += NODES + 1)); do
    for ((port = first; port <= first + NODES; port++)); do
      [[ $used != *" $port "* ]] || continue 2
    done
    echo "$first"
    return
  done
  die "no $((NODES + 1)) free ports in a row between 26817 and 32000"
}

write_conf() { # first port
  local gres="" i
  ((GPUS == 0)) || gres="Gres=gpu:$GPUS"
  {
    cat <<CONF
ClusterName=sandbox
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$1
CommunicationParameters=block_null_hash,NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits as long as credentials last, and a second: 120 s by default
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
# no cgroups, no accounting daemon, no PMIx; CPUs as claimed below, not as found
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
# jobs start at once; the defaults wait for others to come
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=5
# a job in partition urgent takes the nodes of one in main, which is requeued
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=15
SlurmdTimeout=$TIMEOUT
# scontrol show job tells how it ended for a day, not for five minutes
MinJobAge=86400
MessageTimeout=30
CONF
    [[ -z $gres ]] || echo "GresTypes=gpu"
    for ((i = 0; i < NODES; i++)); do
      echo "NodeName=n$i NodeHostname=localhost NodeAddr=127.0.0.1 Port=$(($1 + 1 + i)) CPUs=$CPUS RealMemory=$MEM $gres"
    done
    echo "PartitionName=main Nodes=n[0-$((NODES - 1))] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=5"
    echo "PartitionName=urgent Nodes=n[0-$((NODES - 1))] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF"
  } >"$DIR/slurm.conf"
  rm -f "$DIR/gres.conf"
  if [[ -n $gres ]]; then # plain files stand in for the devices: SLURM hands them out, nothing opens them
    mkdir -p "$DIR/dev"
    for ((i = 0; i < GPUS; i++)); do : >"$DIR/dev/gpu$i"; done
    echo "NodeName=n[0-$((NODES - 1))] Name=gpu AutoDetect=off File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
  fi
}

check_machine() {
  local command
  [[ $(id -u) == 0 ]] || die "needs root: slurmd starts jobs as their users"
  for command in munged slurmctld slurmd sbatch; do
    command -v "$command" >/dev/null || die "$command is not installed; apt-get install --no-install-recommends $PACKAGES"
  done
  # slurm.conf knows no quotes, and a socket's path ends at 107 characters
  [[ $DIR == /* && $DIR != *[[:space:]]* && ${#DIR} -le 85 ]] ||
    die "SLURM_SANDBOX_DIR=$DIR: expected an absolute path without blanks, of at most 85 characters"
  [[ ! -e $DIR || -e $DIR/.slurm-sandbox || -z $(ls -A "$DIR") ]] || die "$DIR is not empty and no sandbox; choose another folder"
}

# ------------------------------------------------------------------ commands
start() {
  local node
  check_machine
  mkdir -p "$DIR"
  exec 9>"$DIR/.slurm-sandbox"
  flock 9 # two starts at once: the second finds it running
  if is_up; then
    echo "already running in $DIR"
    return
  fi
  end_all # the rest of a sandbox that died
  rm -rf "$DIR"/{run,log,state,spool,munge}
  chmod 755 "$DIR"
  mkdir -m 755 "$DIR"/{run,log,state,spool}
  mkdir -m 700 "$DIR/munge"
  echo "$NODES" >"$DIR/nodes"
  (umask 077 && head -c 128 /dev/urandom >"$DIR/munge/key")
  : >"$DIR/log/jobcomp.log"
  write_conf "${SLURM_SANDBOX_PORT:-$(free_ports)}"
  trap end_all EXIT # unless all of it comes up
  # --force: munged refuses a key and a socket below a folder that everybody may write to, as /tmp is
  munged --force --key-file="$DIR/munge/key" --socket="$DIR/run/munge.socket" --pid-file="$DIR/run/munged.pid" \
    --log-file="$DIR/munge/munged.log" --seed-file="$DIR/munge/seed" >"$DIR/log/munged.out" 2>&1 9>&- ||
    die "munged did not start: $(tail -n 1 "$DIR/log/munged.out")"
  wait_until 10 munged munge --no-input --socket="$DIR/run/munge.socket"
  slurmctld -c -f "$SLURM_CONF" >"$DIR/log/slurmctld.out" 2>&1 9>&- || die "slurmctld did not start; logs in $DIR/log"
  for node in $(node_names "$NODES"); do
    mkdir "$DIR/spool/$node"
    slurmd -N "$node" -f "$SLURM_CONF" >"$DIR/log/slurmd-$node.out" 2>&1 9>&- || die "slurmd $node did not start; logs in $DIR/log"
  done
  wait_until 30 slurmctld scontrol ping
  wait_until 60 "the nodes" nodes_are_ready
  trap - EXIT
  echo "started $NODES nodes in $DIR"
}

signal() { # signal, daemon
  local pid
  pid=$(pid_of "$2")
  [[ -z $pid ]] || kill -"$1" "$pid" 2>/dev/null || true
}

end_all() { # TERM to all at once, since each takes seconds; KILL to those that are still there after ten. munged last: they need it
  local daemon tries=100
  for daemon in $(daemons | grep -v munged); do signal TERM "$daemon"; done
  for daemon in $(daemons | grep -v munged); do
    while [[ -n $(pid_of "$daemon") ]] && ((tries-- > 0)); do sleep 0.1; done
    signal KILL "$daemon"
  done
  signal TERM munged
  tries=50
  while [[ -n $(pid_of munged) ]] && ((tries-- > 0)); do sleep 0.1; done
  signal KILL munged
}

stop() {
  local tries=50
  if [[ -n $(pid_of slurmctld) ]]; then # jobs first: a job step outlives its slurmd
    timeout 10 scancel --full --quiet --user=root 2>/dev/null || true
    while [[ -n $(timeout 5 squeue --noheader 2>/dev/null) ]] && ((tries-- > 0)); do sleep 0.2; done
  fi
  end_all
  echo "stopped"
}

status() {
  local daemon pid
  for daemon in $(daemons); do
    pid=$(pid_of "$daemon")
    echo "$daemon ${pid:-down}"
  done
  is_up && sinfo --Node --format='%N %P %t %c %m'
}

case ${1:-} in
  start | stop | status) "$1" ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  *) die "usage: $0 start|stop|status|env" ;;
esac
