"""Where a log's files are, whose they are, and what becomes of them."""

import fcntl
import os
import socket
import tempfile
from types import SimpleNamespace

import pytest

from syncstream.brokers import open_broker
from syncstream.brokers.local import LocalBroker
from syncstream.brokers.local import files as files_module
from syncstream.errors import Unavailable
from tests.brokers.local.logs import payloads, running
from tests.brokers.sinks import Told
from tests.support.pairs import check_script
from tests.support.programs import need_root
from tests.support.waits import TIMEOUT, await_true


def test_names_keep_applications_apart(monkeypatch, folder):
    """By default in a folder of this user's own."""
    monkeypatch.setattr(tempfile, "tempdir", folder)
    brokers = [open_broker(url) for url in ("local:", "local:one", "local:two.3")]
    for broker in brokers:
        broker.publish([("a", broker.path.encode())])
    for broker in brokers:
        assert payloads(broker) == [broker.path.encode()]
        broker.close()
    parent = f"{folder}/syncstream-{os.geteuid()}"
    assert sorted(os.listdir(parent)) == ["default", "one", "two.3"]
    for path in (parent, f"{parent}/default", f"{parent}/default/wake"):
        assert os.stat(path).st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "url",
    [
        *("local://host/path", "local:../x", "local:.x", "local:a/b", "local:a b"),
        *("local:" + "a" * 41, "local:/" + "a" * 80, "memory:"),
        *("local:/", "local:/a/..", "local:/a\0b"),
    ],
)
def test_other_urls_are_refused(url):
    """At once, and in words that show what came."""
    with pytest.raises(ValueError, match=r"url.* must"):
        LocalBroker(url)


@pytest.mark.parametrize("name", ["a b", "50%20off", "a?b#c", "\udcff\n", "\u2028"])
def test_a_path_is_taken_as_it_is(make, folder, name):
    """Nothing in it is decoded, and no character of a folder is refused."""
    broker, told = make(name), Told()
    broker.attach(told)
    broker.watch("a")
    broker.publish([("a", b"x")])
    await_true(lambda: told.payloads == [b"x"])
    assert os.listdir(folder) == [name]


def test_a_private_folder_must_be_private(monkeypatch, folder):
    """Neither a link, nor somebody else's, nor open to others."""
    monkeypatch.setattr(tempfile, "tempdir", folder)
    parent = f"{folder}/syncstream-{os.geteuid()}"
    os.mkdir(f"{folder}/elsewhere", 0o700)
    os.symlink(f"{folder}/elsewhere", parent)
    with pytest.raises(Unavailable, match="must be a directory of user"):
        LocalBroker().publish([("a", b"x")])
    os.unlink(parent)
    os.mkdir(parent)
    os.chmod(parent, 0o755)
    with pytest.raises(Unavailable, match="must be closed to other users: chmod 700"):
        LocalBroker().publish([("a", b"x")])
    os.chmod(parent, 0o700)
    if os.geteuid() == 0:
        os.chown(parent, 12345, -1)
        with pytest.raises(Unavailable, match="must be a directory of user 0"):
            LocalBroker().publish([("a", b"x")])
        os.chown(parent, 0, -1)
    broker = LocalBroker()
    broker.publish([("a", b"x")])
    broker.close()
    assert os.listdir(f"{folder}/elsewhere") == []


MOUNTS = """/dev/vda / ext4 rw 0 0
tmpfs /run tmpfs rw 0 0
server:/export /srv/shared nfs4 rw 0 0
/dev/vdb /srv/shared/disk xfs rw 0 0
//server/share /mnt/with\\040space cifs rw 0 0
host /mnt/host 9p rw 0 0
ssh /mnt/ssh fuse.sshfs rw 0 0
/dev/sdc /mnt/ntfs fuseblk rw 0 0
fuse-overlayfs /box fuse.fuse-overlayfs rw 0 0
share /mnt/host/vm virtiofs rw 0 0
tmpfs /mnt/a\u2028b\x0b\x85\r tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/x", None),
        ("/run/x", None),
        ("/srv/shared", "nfs4"),
        ("/srv/shared/x/y", "nfs4"),
        ("/srv/sharedx", None),
        ("/srv/shared/disk/x", None),
        ("/mnt/with space/x", "cifs"),
        ("/mnt/host/x", "9p"),
        ("/mnt/host/vm/x", "virtiofs"),
        ("/mnt/ssh/x", "fuse.sshfs"),
        ("/mnt/ntfs/x", None),
        ("/box/x", None),
    ],
)
def test_network_file_systems_are_known(path, kind, monkeypatch, folder):
    """By the mount that a path is on."""
    with open(f"{folder}/mounts", "wb") as file:
        file.write(MOUNTS.encode())
    monkeypatch.setattr(files_module, "_MOUNTS", f"{folder}/mounts")
    assert files_module.network_kind(path) == kind


def test_network_file_systems_are_refused(make, monkeypatch, folder):
    """With a message that says what to use."""
    with open(f"{folder}/mounts", "w") as file:
        file.write(f"/dev/vda / ext4 rw 0 0\nserver:/x {folder} nfs rw 0 0\n")
    monkeypatch.setattr(files_module, "_MOUNTS", f"{folder}/mounts")
    with pytest.raises(Unavailable, match=r"network file system \(nfs\).*redis:"):
        make().publish([("a", b"x")])


def test_the_times_of_files_are_fresh(make, folder, monkeypatch):
    """Cleaners go by them: of the log, its lock, its sockets and their folders."""
    monkeypatch.setattr(files_module, "FRESHEN", 0.0)
    broker = make()
    broker.attach(Told())
    broker.watch("a")
    broker.publish([("a", b"x")])
    (name,) = os.listdir(f"{folder}/log/wake")
    names = "", "/log.db", "/log.db-wal", "/log.db-shm", "/lock", "/wake"
    paths = [f"{folder}/log{name}" for name in (*names, f"/wake/{name}")]
    for path in paths:
        os.utime(path, (1, 1))
    await_true(lambda: all(os.stat(path).st_mtime > 1e9 for path in paths))
    assert all(os.stat(path).st_atime > 1e9 for path in paths)


def modes(folder):
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            found[name] = os.stat(f"{parent}/{name}").st_mode & 0o7777
    return found


@pytest.mark.parametrize("umask", [0o022, 0o077, 0])
def test_files_are_their_owners_only(make, folder, umask):
    """Whatever the umask, and also those that an earlier release has made."""
    os.mkdir(f"{folder}/log")
    os.chmod(f"{folder}/log", 0o755)
    with open(f"{folder}/log/lock", "w"):
        os.chmod(f"{folder}/log/lock", 0o644)
    before = os.umask(umask)
    try:
        broker = make()
        broker.attach(Told())
        broker.watch("a")
        broker.publish([("a", b"x")])
    finally:
        os.umask(before)
    found = modes(f"{folder}/log")
    assert found.pop("wake") == 0o700
    assert len(found) == 5
    assert {*found.values()} == {0o600}


def test_folders_of_others_are_refused(make, folder):
    """Whoever owns it reads and forges; whoever may write to it, too."""
    path = f"{folder}/log"
    os.mkdir(path)
    os.chmod(path, 0o777)
    with pytest.raises(Unavailable, match=r"for every user: chmod o-w"):
        make().publish([("a", b"x")])
    os.chmod(path, 0o755)
    need_root("a folder is another user's")
    os.chown(path, 12345, 12345)
    with pytest.raises(Unavailable, match=r"belongs to user 12345.*chmod 2770"):
        make().publish([("a", b"x")])
    os.chown(path, 0, 0)
    os.symlink(path, f"{folder}/link")
    os.chown(f"{folder}/link", 12345, 12345, follow_symlinks=False)
    with pytest.raises(Unavailable, match="belongs to user 12345"):
        make("link").publish([("a", b"x")])
    assert os.listdir(path) == []


SHARES = """
import os, sys
url, user, umask = sys.argv[1], int(sys.argv[2]), int(sys.argv[3], 8)
from syncstream import Hub
import syncstream.brokers.local
os.umask(umask)
if user:
    os.setgroups([23456])
    os.setgid(user)
    os.setuid(user)
hub = Hub(url)
subscription = hub.subscribe("a", after="start")
for line in sys.stdin:
    hub.publish("a", line.strip())
    found = []
    while line.strip() not in found:
        new = subscription.read(15)
        assert new, found
        found += [event.data for event in new]
    print(*found, flush=True)
hub.close()
"""


@pytest.mark.parametrize("umask", ["077", "022"])
@pytest.mark.parametrize("first", [0, 12345], ids=["root-first", "user-first"])
def test_users_of_a_group_share_a_folder(make, folder, first, umask):
    """One of setgid 2770, whoever comes first, and wake each other."""
    need_root("two users share it")
    os.chmod(folder, 0o755)
    path = f"{folder}/log"
    os.mkdir(path)
    os.chown(path, 0, 23456)
    os.chmod(path, 0o2770)
    second = 12345 - first or 54321
    users = [(str(first), umask), (str(second), umask)]
    url = f"local:{path}"
    with running(SHARES, url, *users[0]) as one, running(SHARES, url, *users[1]) as two:

        def say(process, text):
            print(text, file=process.stdin, flush=True)
            return process.stdout.readline().split()

        assert say(one, "1") == ["1"]
        assert say(two, "2") == ["1", "2"]
        assert say(one, "3") == ["2", "3"]
        found = modes(path)
        assert found.pop("wake") == 0o2770
        assert len(found) == 6
        assert {*found.values()} == {0o660}
        for process in (one, two):
            process.stdin.close()
            assert process.wait(TIMEOUT) == 0


def test_who_makes_a_file_has_the_lock(make, folder):
    """Nobody else sees one that has not its rights yet: a reader makes none alone."""
    first = make()
    first.publish([("a", b"x")])
    first.close()
    names = sorted(os.listdir(f"{folder}/log"))
    hasty, reader = make(publish_timeout=0.1), make()
    with open(f"{folder}/log/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="lock is held"):
            hasty.read("a", None)
        assert sorted(os.listdir(f"{folder}/log")) == names
    assert payloads(reader) == [b"x"]


def test_no_file_is_removed_but_a_socket(make, folder):
    """Whoever shares the folder may have put a link in place of the sockets'."""
    broker = make()
    broker.publish([("a", b"1")])
    os.mkdir(f"{folder}/others")
    files = [f"{folder}/others/{name}" for name in ("precious", "1-00000000")]
    for name in files:
        with open(name, "w"):
            pass
    os.rename(f"{folder}/log/wake", f"{folder}/log/was")
    os.symlink(f"{folder}/others", f"{folder}/log/wake")
    broker.publish([("a", b"2")])
    os.unlink(f"{folder}/log/wake")
    os.rename(f"{folder}/others", f"{folder}/log/wake")
    broker.publish([("a", b"3")])
    assert {*os.listdir(f"{folder}/log/wake")} == {"precious", "1-00000000"}


@pytest.mark.parametrize("name", ["lock", "log.db"])
def test_no_link_is_followed(make, folder, name):
    """Whoever shares the folder may have put one in place of a file."""
    os.mkdir(f"{folder}/log", 0o700)
    os.symlink(f"{folder}/elsewhere", f"{folder}/log/{name}")
    with pytest.raises(Unavailable, match="plain file"):
        make().publish([("a", b"1")])
    assert not os.path.lexists(f"{folder}/elsewhere")


@pytest.mark.parametrize("name", ["lock", "log.db"])
def test_who_makes_a_file_may_be_killed(make, folder, name):
    """Between the two names that it has for a moment: the first one goes."""
    make().publish([("a", b"1")])
    os.link(f"{folder}/log/{name}", f"{folder}/log/{name}-0123abcd")
    broker = make()
    broker.publish([("a", b"2")])
    assert payloads(broker) == [b"1", b"2"]
    assert f"{name}-0123abcd" not in os.listdir(f"{folder}/log")


def test_links_lead_nowhere(make, folder, monkeypatch):
    """Those in a folder that a group shares: no times are changed, nobody is woken."""
    monkeypatch.setattr(files_module, "FRESHEN", 0.0)
    broker = make()
    broker.publish([("a", b"1")])
    elsewhere = f"{folder}/elsewhere"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(elsewhere)
        other.setblocking(False)
        os.symlink(elsewhere, f"{folder}/log/wake/1-00000000")
        broker.publish([("a", b"2")])
        with pytest.raises(BlockingIOError):
            other.recv(1)
    os.rename(f"{folder}/log/wake", f"{folder}/was")
    os.symlink(elsewhere, f"{folder}/log/wake")
    os.utime(elsewhere, (1, 1))
    broker.publish([("a", b"3")])
    assert os.stat(elsewhere).st_mtime == 1


def test_a_link_has_no_mode_changed(folder, monkeypatch):
    """Not either if it takes a file's place after that was looked at."""
    open(f"{folder}/precious", "w").close()
    os.chmod(f"{folder}/precious", 0o640)
    found = os.stat(f"{folder}/precious")
    os.symlink(f"{folder}/precious", f"{folder}/link")
    monkeypatch.setattr(os, "lstat", lambda path: found)
    files_module.settle(f"{folder}/link", 0o600, found.st_gid)
    assert modes(folder)["precious"] == 0o640


REFUSED = """
import logging, os, sys
from syncstream import Hub
from syncstream.errors import Unavailable
import syncstream.brokers.local
logging.disable()
user = int(sys.argv[2])
os.setgroups([])
os.setgid(user)
os.setuid(user)
hub = Hub(sys.argv[1])
try:
    hub.publish("a", "x")
except Unavailable as error:
    print(error)
print(hub.stats()["up"])
hub.close()
"""


def test_another_user_is_told_what_to_do(make, folder):
    """As whom to run, and how to share; stats say that it does not work."""
    need_root("two users share it")
    os.chmod(folder, 0o755)
    make().publish([("a", b"x")])
    lines = check_script(REFUSED, f"local:{folder}/log", "12345").splitlines()
    assert "chmod 2770" in lines[0]
    assert lines[1] == "False"


def test_a_lock_is_one_threads(folder):
    """It is tried without waiting, waited for, and counts while its file is there."""
    path = f"{folder}/log"
    mine, theirs = (files_module.Lock(path, False) for _ in range(2))
    assert not mine.try_acquire()  # it is not open
    assert not mine.hold(1.0)
    mine.open()
    mine.open()
    assert mine.try_acquire()
    theirs.open()
    assert not theirs.try_acquire()
    assert not theirs.hold(0.01)
    with pytest.raises(Unavailable, match="is held by another process"):
        theirs.acquire(0.01)
    mine.release()
    assert theirs.try_acquire()
    theirs.release()
    os.unlink(f"{path}/lock")
    assert not mine.try_acquire()  # of a removed file: it closes it
    assert not mine.hold(1.0)
    mine.acquire()
    assert theirs.hold(0.01) is False  # it waits for the one of now
    mine.release()
    theirs.acquire(1.0)
    assert not mine.try_acquire()
    theirs.close()
    assert mine.try_acquire()
    os.unlink(f"{path}/lock")
    mine.release()
    assert mine.hold(1.0)  # to close files it is enough
    mine.close()
    assert not mine.try_acquire()


def test_times_are_freshened_once_a_minute(folder, monkeypatch):
    """Just then, and those of other files with them."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(files_module, "time", clock)
    path = f"{folder}/a/log"
    os.makedirs(path)
    names = ["..", ".", "lock", "log.db", "other"]
    for name in names[2:]:
        with open(f"{path}/{name}", "w"):
            pass

    def freshened(*others):
        """Return the names of the files that are not old any more; make all old."""
        for name in names:
            os.utime(f"{path}/{name}", (1, 1))
        times.freshen(*others)
        return [name for name in names if os.stat(f"{path}/{name}").st_mtime > 1]

    for is_private in (False, True):
        times = files_module.FileTimes(path, is_private)
        theirs = [".."] * is_private + [".", "lock", "log.db"]
        assert freshened() == theirs
        clock.now += files_module.FRESHEN - 0.5
        assert freshened(f"{path}/other") == []
        clock.now += 0.5
        assert freshened(f"{path}/other", f"{path}/missing") == [*theirs, "other"]


def test_names_and_paths_have_a_length(folder, monkeypatch):
    """Just as long as they may be; their sockets' names are longer still."""
    monkeypatch.setattr(tempfile, "tempdir", "/t")
    path, is_private = files_module.path_of(f"local:{'x' * 40}")
    assert path == f"/t/syncstream-{os.geteuid()}/{'x' * 40}"
    assert is_private
    assert files_module.path_of("local:")[0].endswith("/default")
    for url in (f"local:{'x' * 41}", "local:a b", "local:.a", "local:-a"):
        with pytest.raises(ValueError, match="at most 40 letters"):
            files_module.path_of(url)
    assert files_module.path_of(f"local:/{'x' * 79}") == (f"/{'x' * 79}", False)
    with pytest.raises(ValueError, match="80 bytes at most"):
        files_module.path_of(f"local:/{'x' * 80}")
    with pytest.raises(ValueError, match="80 bytes at most"):
        files_module.path_of(f"local:/{'ü' * 40}")
