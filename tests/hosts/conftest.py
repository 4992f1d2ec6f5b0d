"""Hosts made of network namespaces, each with a real sshd, and a real Slurm of two nodes; root only.

Everything carries the pid of this test process in its name, listens on addresses of its own, and is taken
away at the end: namespaces, bridge, daemons. The user's ssh configuration is neither read nor changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PATIENCE_S = 600.0
TOOLS = {
    "network": ("ip", "ssh", "ssh-keygen", "sshd"),
    "slurm": ("sbatch", "slurmctld", "munged"),
}
COMMAND = Path(sys.executable).with_name("flagscale-train")

EXPERIMENT = """
defaults: [_self_, {{train: tiny}}]
experiment:
  exp_name: tiny
  exp_dir: {folder}/exp
  task: {{type: train, backend: megatron}}
  runner: {{nproc_per_node: 1, hostfile: {folder}/hostfile}}
  envs: {{OMP_NUM_THREADS: 1, EVERYWHERE: common}}
action: run
"""
TRAIN = """
system: {{num_workers: 0, log_interval: 1, checkpoint: {{save_interval: 1000}}}}
model:
  num_layers: 2
  hidden_size: 32
  ffn_hidden_size: 64
  num_attention_heads: 2
  normalization: RMSNorm
  disable_bias_linear: true
  swiglu: true
  position_embedding_type: rope
  seq_length: 16
  max_position_embeddings: 16
  train_iters: {steps}
  micro_batch_size: 1
  global_batch_size: 4
  eval_interval: 1000000
  eval_iters: 1
  optimizer: {{lr: 1.0e-3, lr_decay_style: constant}}
data:
  data_path: {folder}/text
  split: 90,10,0
  tokenizer: {{tokenizer_type: NullTokenizer, vocab_size: 64}}
"""


def until(claim: Callable[[], object], what: str, limit_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + limit_s
    while not claim():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.1)


def free_ports(count: int) -> int:
    """Return the first of some adjacent free ports, of those that the kernel gives to no connection."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        first = random.randrange(10000, max(low, 20000) - count)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for number in range(first, first + count):
                held.enter_context(socket.create_server(("", number)))
            return first


def processes() -> dict[int, int]:
    """Return pid and start time of every living process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    found[int(entry.name)] = int(fields[19])
    return found


def mentioning(text: str) -> list[str]:
    """Describe every other living process with a text in its command, directory or environment."""
    found = []
    for pid in processes():
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            place = Path(f"/proc/{pid}")
            words = (place / "cmdline").read_bytes()
            known = words + (place / "environ").read_bytes() + os.fsencode((place / "cwd").readlink())
            if text.encode() in known:
                found.append(f"{pid}: {words.replace(bytes(1), b' ').decode(errors='replace')[:160]}")
    return found


def call(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}{done.stdout}"
    return done.stdout


@dataclass
class Network:
    """A bridge with hosts; host `i` has the address `net.i+10`."""

    folder: Path
    count: int
    daemons: dict[int, subprocess.Popen] = field(default_factory=dict)
    tag: str = field(default_factory=lambda: f"fs{os.getpid()}")
    net: str = field(default_factory=lambda: f"198.18.{os.getpid() % 250 + 1}")

    until = staticmethod(until)

    def address(self, number: int) -> str:
        return f"{self.net}.{number + 10}"

    def space(self, number: int) -> str:
        return f"{self.tag}h{number}"

    def up(self) -> None:
        call("ip", "link", "add", f"{self.tag}b", "type", "bridge")
        call("ip", "addr", "add", f"{self.net}.1/24", "dev", f"{self.tag}b")
        call("ip", "link", "set", f"{self.tag}b", "up")
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("host", "user", "stranger"):
            call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        shutil.copy(self.folder / "user.pub", self.folder / "authorized")
        for number in range(1, self.count + 1):
            self.add(number)
        self.configure("user")

    def add(self, number: int) -> None:
        space, outer = self.space(number), f"{self.tag}v{number}"
        call("ip", "netns", "add", space)
        call("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
        call("ip", "link", "set", outer, "master", f"{self.tag}b", "up")
        inside = ("ip", "-n", space)
        call(*inside, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        call(*inside, "link", "set", "eth0", "up")
        call(*inside, "link", "set", "lo", "up")
        self.start_sshd(number)

    def start_sshd(self, number: int) -> None:
        options = {
            "AuthorizedKeysFile": self.folder / "authorized",
            "StrictModes": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "UsePAM": "no",
            "PidFile": "none",
            "ListenAddress": self.address(number),
            "SetEnv": f"XDG_CACHE_HOME={self.folder}/cache{number}",
        }
        words = ["ip", "netns", "exec", self.space(number), "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null"]
        words += ["-h", str(self.folder / "host")]
        for name, value in options.items():
            words += ["-o", f"{name}={value}"]
        if number in self.daemons:
            self.daemons[number].wait()
        with (self.folder / f"sshd{number}.log").open("ab") as log:
            self.daemons[number] = subprocess.Popen(
                words, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        until(lambda: self.answers(number), f"sshd {number}")

    @contextlib.contextmanager
    def own_disk(self, number: int, folder: Path) -> Iterator[None]:
        """Give a host an empty disk where the others have a folder; sshd's mount namespace is the host's."""
        enter = ("nsenter", "-m", "-t", str(self.daemons[number].pid))
        folder.mkdir(exist_ok=True)
        call(*enter, "mount", "-t", "tmpfs", "none", str(folder))
        try:
            yield
        finally:
            call(*enter, "umount", "-l", str(folder))

    def occupy(self, number: int, port: int) -> subprocess.Popen:
        """Let something listen on a port of a host."""
        words = ["ip", "netns", "exec", self.space(number), sys.executable, "-m", "http.server", str(port)]
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder)
        until(lambda: self.listening(number), "the listener")
        return child

    def pids(self, number: int) -> list[int]:
        """Return the processes of a host, its sshd among them."""
        return [int(word) for word in call("ip", "netns", "pids", self.space(number)).split()]

    def kill_worker(self, number: int) -> None:
        """Kill the training process of a host, as the kernel does when memory is short."""
        for pid in self.pids(number):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(bytes(1))
                if b"flagscale_train.worker" in words and b"flagscale_train.worker.torchrun" not in words:
                    os.kill(pid, signal.SIGKILL)

    def answers(self, number: int) -> bool:
        import socket

        with socket.socket() as trial:
            trial.settimeout(1.0)
            return trial.connect_ex((self.address(number), 22)) == 0

    def configure(self, key: str) -> None:
        """Write an ssh configuration with one of the keys."""
        (self.folder / "config").write_text(
            f"Host *\n  User root\n  IdentityFile {self.folder / key}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.folder / 'known'}\n  StrictHostKeyChecking accept-new\n"
        )

    def cut(self, number: int) -> None:
        call("ip", "link", "set", f"{self.tag}v{number}", "down")

    def mend(self, number: int) -> None:
        call("ip", "link", "set", f"{self.tag}v{number}", "up")

    def kill(self, number: int) -> None:
        """Kill everything on a host at once, its sshd too, as a crash does."""
        for pid in self.pids(number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def listening(self, number: int) -> list[str]:
        """Return the sockets that listen on a host, but for its sshd."""
        rows = call("ip", "netns", "exec", self.space(number), "ss", "-Hltn").splitlines()
        return [row for row in rows if not row.split()[3].endswith(":22")]

    def down(self) -> None:
        for number in range(1, self.count + 1):
            if self.space(number) in call("ip", "netns", "list"):
                self.kill(number)
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        for number in range(1, self.count + 1):
            call("ip", "netns", "del", self.space(number), check=False)
        call("ip", "link", "del", f"{self.tag}b", check=False)


@dataclass
class Bench:
    """A folder with an experiment, and the command on it."""

    folder: Path
    env: dict[str, str]

    def hosts(self, *lines: str) -> None:
        (self.folder / "hostfile").write_text("".join(f"{line}\n" for line in lines))

    def write(self, steps: int) -> Path:
        conf = self.folder / "conf"
        (conf / "train").mkdir(parents=True, exist_ok=True)
        (conf / "train" / "tiny.yaml").write_text(TRAIN.format(folder=self.folder, steps=steps))
        file = conf / "tiny.yaml"
        file.write_text(EXPERIMENT.format(folder=self.folder))
        return file

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [COMMAND, *words], env=self.env, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def do(self, *words: str, code: int = 0) -> str:
        child = self.start(*words)
        said, _ = child.communicate(timeout=PATIENCE_S * 2)
        assert child.returncode == code, said
        return said

    def status(self) -> dict:
        child = self.start("status", "--json", str(self.folder / "exp"))
        return json.loads(child.communicate(timeout=PATIENCE_S)[0])

    def until_step(self, step: int) -> None:
        def reached() -> bool:
            now = self.status()
            assert not now["is_over"], now["what_happened"]
            return now["progress"]["iteration"] >= step

        until(reached, f"step {step}", limit_s=PATIENCE_S * 2)

    def left(self) -> list[str]:
        """Return the processes that still have to do with a run of this experiment."""
        return mentioning(f"{self.folder}/exp/runs")


def write_data(prefix: Path) -> None:
    from flagscale_train.data.indexed import IndexedWriter

    chance = random.Random(1)
    with IndexedWriter(prefix, "H") as writer:
        for _ in range(100):
            ids = [(chance.randrange(64) + place) % 64 for place in range(40)]
            writer.add(array("H", ids).tobytes(), [len(ids)])


def demand(*names: str) -> None:
    """Fail where a test could not be run: a skipped proof looks like a proof."""
    if os.geteuid() != 0:
        pytest.fail("these tests make hosts, which only root may: run them as root", pytrace=False)
    missing = [name for name in names if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    if missing:
        pytest.fail(
            f"{', '.join(missing)}: not installed: apt-get install openssh-server iproute2 slurm-wlm munge",
            pytrace=False,
        )


@pytest.fixture
def mentioned() -> Callable[[str], list[str]]:
    return mentioning


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    demand(*TOOLS["network"])
    made = Network(tmp_path_factory.mktemp("network"), count=4)
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    write_data(tmp_path / "text")
    env = {**os.environ, "FLAGSCALE_STATE_DIR": str(tmp_path / "state")}
    made = Bench(tmp_path, env)
    yield made
    subprocess.run(
        [COMMAND, "stop", "--grace", "0", str(tmp_path / "exp")], env=env, capture_output=True, check=False
    )


@pytest.fixture
def cluster(network: Network, bench: Bench) -> Network:
    """The hosts, with the bench told how to reach them."""
    network.configure("user")
    bench.env["FLAGSCALE_SSH"] = f"ssh -F {network.folder / 'config'}"
    return network


@dataclass
class SlurmCluster:
    """A Slurm of two nodes on this machine, with daemons and a munge of its own."""

    folder: Path
    daemons: list[subprocess.Popen] = field(default_factory=list)

    def up(self) -> None:
        host = call("hostname", "-s").strip()
        first = free_ports(3)
        self.folder.chmod(0o755)
        munge = Path(f"/run/munge-{os.getpid()}")  # its folders must be private to it, all the way up
        munge.mkdir(mode=0o755)
        self.munge = munge
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        call("chown", "-R", "munge:munge", str(munge))
        for name in ("spool", "state", "log"):
            (self.folder / name).mkdir()
        lines = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={munge}/socket",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SlurmctldPort": first,
            "SlurmdSpoolDir": f"{self.folder}/spool/%n",
            "StateSaveLocation": f"{self.folder}/state",
            "SlurmctldPidFile": f"{self.folder}/slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/slurmd-%n.pid",
            "SlurmctldLogFile": f"{self.folder}/log/slurmctld",
            "SlurmdLogFile": f"{self.folder}/log/slurmd-%n",
            "ReturnToService": 2,
            "KillWait": 5,
            "MailProg": "/bin/true",
            "SrunPortRange": "61000-63000",
        }
        nodes = [
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={first + number} RealMemory=1000"
            for number in (1, 2)
        ]
        conf = self.folder / "slurm.conf"
        text = [f"{name}={value}" for name, value in lines.items()]
        conf.write_text("\n".join([*text, *nodes, "PartitionName=all Nodes=n1,n2 Default=YES State=UP", ""]))
        self.env = {**os.environ, "SLURM_CONF": str(conf)}
        self.spawn(
            "runuser", "-u", "munge", "--", "/usr/sbin/munged", "-F", "--key-file", f"{munge}/key",
            "--socket", f"{munge}/socket", "--pid-file", f"{munge}/pid", "--log-file", f"{munge}/log",
            "--seed-file", f"{munge}/seed",
        )  # fmt: skip
        until((munge / "socket").exists, "munge")
        self.spawn("/usr/sbin/slurmctld", "-D", "-i", "-f", str(conf))
        for number in (1, 2):
            self.spawn("/usr/sbin/slurmd", "-D", "-N", f"n{number}", "-f", str(conf))
        until(self.has_two_idle_nodes, "two idle nodes")

    def has_two_idle_nodes(self) -> bool:
        for daemon in self.daemons:
            if daemon.poll() is not None:
                logs = (self.folder / "daemons.log", *(self.folder / "log").iterdir())
                said = "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)
                pytest.fail(f"{daemon.args} ended with {daemon.returncode}:\n{said}")
        return self.ask("sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"]

    def spawn(self, *words: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            child = subprocess.Popen(
                words, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.daemons.append(child)

    def ask(self, *words: str) -> str:
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, check=False)
        return done.stdout

    def down(self) -> None:
        if hasattr(self, "env"):
            self.ask("scancel", "--user=root")
            with contextlib.suppress(AssertionError):
                until(lambda: not self.ask("squeue", "-h").strip(), "an empty queue", limit_s=30.0)
        for daemon in reversed(self.daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()
        if hasattr(self, "munge"):
            shutil.rmtree(self.munge, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    demand(*TOOLS["slurm"])
    made = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster, bench: Bench) -> SlurmCluster:
    """Slurm, with the bench told where its configuration is."""
    bench.env.update(slurm_cluster.env, FLAGSCALE_STATE_DIR=bench.env["FLAGSCALE_STATE_DIR"])
    return slurm_cluster
