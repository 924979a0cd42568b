"""Several hosts on one machine: each has its own network, processes, name and ssh daemon, and shares the file system.

A host is a tree of Linux namespaces below one process, `unshare`; its network card is one end of a veth pair, whose other
end is a port of a bridge in a namespace of its own. Nothing of it has a name outside: when the process ends, even by
SIGKILL, the kernel ends everything in the host and removes its network.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

NEEDED = ("ip", "unshare", "nsenter", "mount", "sshd", "ssh", "ssh-keygen", "pdsh")
"""Commands: Debian's iproute2, util-linux, mount, openssh-server, openssh-client, pdsh."""

SUBNET = "10.213.77"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

IN_THE_HOST = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh" /etc/ssh
mount --bind "$2/shadow" /etc/shadow
exec "$3" -D -e -f /etc/ssh/sshd_config
"""

SSHD = """
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
"""

SSH = """
Host *
  IdentityFile /etc/ssh/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 10
"""


def why_not() -> str:
    """Why this machine cannot make hosts; "" where it can."""
    if os.uname().sysname != "Linux":
        return "hosts are made of Linux namespaces, this is no Linux"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    lacking = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if lacking:
        return f"{', '.join(lacking)} not found: apt-get install iproute2 openssh-server openssh-client pdsh"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c",
         "ip link set lo up && ip link add end0 type veth peer name end1 && ip link add br0 type bridge "
         "&& mount -t tmpfs x /run"],
        capture_output=True, text=True, env=os.environ | {"PATH": PATH}, check=False,
    )  # fmt: skip
    return (
        f"this machine's kernel does not let root make namespaces: {tried.stderr.strip()}" if tried.returncode else ""
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Hosts:
    """host1, host2, ... as a context; ssh between them asks for no password.

    folder: for their files. environment: of what is started in them.
    """

    def __init__(self, folder: Path, count: int, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.names = [f"host{number}" for number in range(1, count + 1)]
        self._processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Hosts":
        try:
            self._write_files()
            self._start("switch", ["sleep", "infinity"])
            self._inside("switch", "ip link add br0 type bridge && ip link set br0 up")
            for number, name in enumerate(self.names, 1):
                script = ["sh", "-c", IN_THE_HOST, "sh", name, self.folder, shutil.which("sshd", path=PATH)]
                self._start(name, script, "--pid", "--mount", "--uts", "--mount-proc")
                card = f"ip link add port{number} type veth peer name eth0 netns {self._processes[name].pid}"
                self._inside("switch", f"{card} && ip link set port{number} master br0 up")
                self._inside(
                    name, f"ip link set lo up && ip addr add {SUBNET}.{number}/24 dev eth0 && ip link set eth0 up"
                )
            self._wait_for_ssh()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()

    def start(self, name: str, command: Sequence, folder: Path, log: Path) -> subprocess.Popen:
        """Starts a command in a host, in `folder`, its output to `log`."""
        with log.open("w") as out:
            return subprocess.Popen(
                ["nsenter", "-t", self._child(name), "-n", "-p", "-m", "-u", f"--wd={folder}", *map(str, command)],
                stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=self.environment, preexec_fn=_die_with_parent,
            )  # fmt: skip

    def run(self, name: str, command: Sequence, folder: Path, log: Path, timeout: float) -> tuple[int, str]:
        """(exit code, output) of a command in a host; AssertionError where it has not ended after `timeout` seconds."""
        process = self.start(name, command, folder, log)
        try:
            return process.wait(timeout), log.read_text()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} hangs: {log.read_text()[-3000:]}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def pids(self, name: str, words: str) -> list[int]:
        """Process ids, in the host's own count, of its processes whose command line holds `words`."""
        pattern = f"[{words[0]}]{words[1:]}"  # which the search's own command line does not match
        found = self._output(name, f"grep -la -- '{pattern}' /proc/[0-9]*/cmdline")
        return [int(path.split("/")[2]) for path in found.split()]

    def send(self, name: str, number: int, pids: Sequence[int]) -> None:
        """A signal to processes of a host."""
        self._output(name, f"kill -{number} {' '.join(map(str, pids))}")

    def _start(self, name: str, command: Sequence, *namespaces: str) -> None:
        log = (self.folder / f"{name}.log").open("w")
        fork = ("--fork", "--kill-child") if namespaces else ()
        self._processes[name] = subprocess.Popen(
            ["unshare", "--net", *namespaces, *fork, *map(str, command)],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | {"PATH": PATH}, preexec_fn=_die_with_parent,
        )  # fmt: skip
        log.close()
        self._until(lambda: self._is_apart(name), f"{name} has no network of its own")

    def _is_apart(self, name: str) -> bool:
        own, ours = Path(f"/proc/{self._processes[name].pid}/ns/net"), Path("/proc/self/ns/net")
        return own.exists() and own.readlink() != ours.readlink()

    def _child(self, name: str) -> str:
        """The first process of a host, as seen from here."""
        pid = self._processes[name].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return children[0] if children else str(pid)

    def _inside(self, name: str, script: str) -> None:
        """A script in the network of a host, but with our processes and files."""
        pid = str(self._processes[name].pid)
        command = ["nsenter", "-t", pid, "-n", "sh", "-c", script]
        subprocess.run(command, check=True, env=os.environ | {"PATH": PATH})

    def _output(self, name: str, script: str) -> str:
        command = ["nsenter", "-t", self._child(name), "-n", "-p", "-m", "-u", "sh", "-c", script]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, env={"PATH": PATH}, check=False).stdout

    def _wait_for_ssh(self) -> None:
        for name in self.names:
            self._until(
                lambda name=name: self._output(self.names[0], f"ssh {name} hostname").strip() == name,
                f"no ssh from {self.names[0]} to {name}",
            )

    def _until(self, true, what: str) -> None:
        ends = time.monotonic() + 60
        while not true():
            if time.monotonic() > ends or any(p.poll() is not None for p in self._processes.values()):
                logs = "\n".join(f"{path.name}: {path.read_text()[-1000:]}" for path in self.folder.glob("*.log"))
                raise AssertionError(f"{what}; {logs}")
            time.sleep(0.05)

    def _write_files(self) -> None:
        ssh = self.folder / "ssh"
        ssh.mkdir(parents=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / "key"], check=True)
        (ssh / "sshd_config").write_text(SSHD)
        (ssh / "ssh_config").write_text(SSH)
        lines = [f"{SUBNET}.{number} {name}" for number, name in enumerate(self.names, 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        (self.folder / "shadow").write_text("root:*:19000:0:99999:7:::\nsshd:!:19000::::::\n")  # "!" would be locked
        (self.folder / "shadow").chmod(0o600)
