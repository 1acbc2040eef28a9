"""The suites known by name: orders, metrics, where they are, their download and checksums."""

import functools
import http.server
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import study
from conftest import files_of, write_json

import data
from harness.arguments import build_parser
from inputs import suites
from inputs.errors import InputError
from inputs.files import git_blob_file, sha256_file
from inputs.suites import NAMED
from inputs.task_files import read_task

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "Long_Sequence"
ORDERS = {
    "order4": "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo",
    "order5": "multirc boolq wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo",
    "order6": "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic",
}


@pytest.fixture(params=NAMED)
def published(request, tmp_path, monkeypatch):
    """A named suite of small files, which stand below tmp_path / "published"."""
    named = NAMED[request.param]
    instances = {"Definition": [], "Instances": [{"input": "a", "output": "b"}]}
    for task in named.tasks:
        for split in ("train", "test"):
            write_json(tmp_path / "published" / task / f"{split}.json",
                       instances | {"Note": f"{task} {split}"})
    lines = [f"{named.checksum(path)}  {path.relative_to(tmp_path / 'published')}\n"
             for path in (tmp_path / "published").rglob("*.json")]
    (tmp_path / "manifest").write_text("".join(lines))
    small = named._replace(manifest_file=tmp_path / "manifest")
    monkeypatch.setitem(NAMED, named.name, small)
    monkeypatch.delenv("BADIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return small


class Asked(list):
    """The paths that a server was asked for; `faults` {path: what it does in place of sending}."""

    def __init__(self):
        self.faults = {}


@pytest.fixture
def asked(published, tmp_path, monkeypatch):
    """The paths asked for of a server of the published files."""
    paths = Asked()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Print nothing."""

        def do_GET(self):
            paths.append(self.path.removeprefix("/"))
            fault = paths.faults.get(self.path)
            if fault is None:
                super().do_GET()
            elif isinstance(fault, int):
                self.send_error(fault)
            elif fault != "dropped":
                self.send_response(302 if fault == "bad redirect" else 200)
                if fault == "bad redirect":
                    self.send_header("Location", "http://[::1")
                self.send_header("Content-Length", "abc" if fault == "no length" else "99")
                self.end_headers()
                self.wfile.write(b"{")

    handler = functools.partial(Handler, directory=tmp_path / "published")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        monkeypatch.setitem(NAMED, published.name, published._replace(url=url))
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield paths
        server.shutdown()


@pytest.mark.parametrize("name", NAMED)
def test_manifests_know_every_task(name):
    named = NAMED[name]
    manifest = named.manifest()
    assert {path.split("/")[0] for path in manifest} == set(named.tasks) and len(named.tasks) == 15
    assert all({f"{task}/train.json", f"{task}/test.json"} <= manifest.keys()
               for task in named.tasks)
    digits = {sha256_file: 64, git_blob_file: 40}[named.checksum]
    assert {len(checksum) for checksum in manifest.values()} == {digits}


@pytest.mark.parametrize("content", [b"", b"abc\n", b"\r\n\x00" * 100_000])
def test_git_blob_file(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    answer = subprocess.run(["git", "hash-object", "--no-filters", tmp_path / "file"],
                            capture_output=True, text=True, check=True)
    assert git_blob_file(tmp_path / "file") == answer.stdout.strip()


@pytest.mark.parametrize("order", ORDERS)
def test_orders_by_name(order):
    """Of all tasks and of some, whatever the seed; no other suite has them."""
    names = ORDERS[order].split()
    assert data.task_order(sorted(names), 3, [order]) == names
    assert data.task_order({"yahoo", "cb", "rte"}, 1, [order]) == [
        name for name in names if name in ("yahoo", "cb", "rte")]
    assert data.task_order(names, 3, names[::-1]) == names[::-1]
    with pytest.raises(InputError, match=f"{order} is for tasks of long_sequence, not for mine"):
        data.task_order(["cb", "mine"], 3, [order])
    assert data.task_order([order], 3, [order]) == [order]  # a task may be named so


def test_an_unknown_order_is_a_task():
    with pytest.raises(InputError, match="'order7' is unknown"):
        data.task_order(ORDERS["order4"].split(), 1, ["order7"])


PLACES = ["data_dir", "variable", "folder in variable", "cache"]


@pytest.mark.parametrize("place", PLACES)
def test_places(published, tmp_path, monkeypatch, place):
    """One variable serves both suites: it names their folder, or the folder of their folders."""
    folder = tmp_path / {"folder in variable": f"there/{published.name}",
                         "cache": f"cache/badit/{published.name}"}.get(place, "there")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if "variable" in place:
        monkeypatch.setenv("BADIT_DATA", str(tmp_path / "there"))
    if place == "data_dir":
        monkeypatch.setenv("BADIT_DATA", str(tmp_path / "wrong"))  # which it overrules
    data_dir = folder if place == "data_dir" else None
    with pytest.raises(InputError, match=published.name):
        data.load_suite(published.name, data_dir)
    (tmp_path / "published").rename(folder)
    suite = data.load_suite(published.name, data_dir)
    assert suite.name == published.name
    assert {name: (task.category, task.metric) for name, task in suite.tasks.items()
            } == published.tasks
    file = folder / next(iter(published.tasks)) / "test.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(InputError, match=f"{file} is not the published file"):
        data.load_suite(published.name, data_dir)


@pytest.mark.parametrize("variable", [False, True])
def test_download_goes_on(published, asked, tmp_path, monkeypatch, capsys, variable):
    """It fetches what is missing or wrong, says what is there, and refuses a wrong file."""
    if variable:
        monkeypatch.setenv("BADIT_DATA", str(tmp_path / "there"))
        folder, flags = tmp_path / "there" / published.name, []
    else:
        folder, flags = tmp_path / "there", ["--data_dir", str(tmp_path / "there")]
    files = set(published.manifest())
    assert data.main(["download", published.name, *flags]) == 0
    assert sorted(asked) == sorted(files)
    assert f"{folder}: 15 tasks, 15 training and 15 test" in capsys.readouterr().out
    wrong, lost = sorted(files)[:2]
    asked.clear()
    (folder / wrong).write_text("wrong")
    (folder / lost).unlink()
    assert data.main(["verify", published.name, *flags]) == 2
    assert wrong in capsys.readouterr().err and asked == []
    assert data.main(["download", published.name, *flags]) == 0
    assert set(asked) == {wrong, lost}
    (tmp_path / "published" / lost).write_text("other")
    (folder / lost).unlink()
    assert data.main(["download", published.name, *flags]) == 2
    assert lost in capsys.readouterr().err and not (folder / lost).exists()
    assert {path for path in folder.rglob("*") if path.is_file()} == {
        folder / name for name in files - {lost}}


@pytest.mark.parametrize("fault", [404, 500, "dropped", "truncated", "bad redirect", "no length"])
def test_download_fails_and_goes_on(published, asked, fault, tmp_path, capsys):
    """A fault names the file and leaves only whole files; a second call fetches the rest."""
    path = sorted(published.manifest())[3]
    command = ["download", published.name, "--data_dir", str(tmp_path / "there")]
    asked.faults[f"/{path}"] = fault
    assert data.main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert path in line and "run the command again" in line
    kept = files_of(tmp_path / "there")
    assert path not in kept and kept.items() <= files_of(tmp_path / "published").items()
    asked.faults.clear()
    asked.clear()
    assert data.main(command) == 0
    assert set(asked) == published.manifest().keys() - kept
    assert files_of(tmp_path / "there") == files_of(tmp_path / "published")


def test_download_without_a_server(published, monkeypatch, tmp_path, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        monkeypatch.setitem(NAMED, published.name, published._replace(url=url))
        assert data.main(["download", published.name, "--data_dir", str(tmp_path / "there")]) == 2
    assert next(iter(published.manifest())) in capsys.readouterr().err
    assert files_of(tmp_path / "there") == {}


def test_verify_shows_any_folder_in_one_line(tmp_path, capsys):
    """With status 2 where the folder holds no suite, whatever its name holds."""
    folder = str(tmp_path) + "/a\nb\x1b\udcff"
    assert data.main(["verify", "superni", "--data_dir", folder]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and r"a\nb\x1b\udcff" in err


def test_names_of_suites_are_told():
    """Where a suite is unknown, where --data_dir is not read, and in --help."""
    for call in (lambda: data.load_suite("maxi"), lambda: data.load_suite("mini", "somewhere")):
        with pytest.raises(InputError, match="superni.*long_sequence"):
            call()
    assert set(suites.ORDERS) == set(ORDERS)
    for word in (*NAMED, *ORDERS):
        assert word in build_parser().format_help()


def test_study_of_a_suite_that_is_not_there(published, capsys):
    """Its task names are known wherever the data may be."""
    assert study.main(["--suite", published.name, "--methods", "lora", "--seeds", "1", "--models",
                       "smollm2-135m", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for task in published.tasks:
        assert sum(f" --tasks {task} " in line for line in lines) == 1


@pytest.mark.parametrize("definition", [[], "", " ", ["", "\n"]])
def test_empty_definition(tmp_path, definition):
    """The prompt is then the frame of the input alone."""
    rows = [{"input": "Which?", "output": "A"}]
    for split in ("train", "test"):
        write_json(tmp_path / "copa" / f"{split}.json",
                   {"Definition": definition, "Instances": rows})
    task = read_task(tmp_path / "copa")
    assert data.build_prompt(task.definition, task.train[0]["input"]) == (
        "Now complete the following example -\nInput: Which?\nOutput: ")


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/Long_Sequence")
def test_real_files():
    """The five small tasks as they were published."""
    named = NAMED["long_sequence"]
    there = {name: checksum for name, checksum in named.manifest().items()
             if (REAL / name).is_file()}
    assert len(there) == 15
    assert all(named.checksum(REAL / name) == checksum for name, checksum in there.items())
    counts = {}
    for name in {path.split("/")[0] for path in there}:
        task = read_task(REAL / name, named.tasks[name])
        assert task.metric == "accuracy" and bool(task.definition) == (name != "copa")
        counts[name] = len(task.train), len(task.test)
    assert counts == {"cb": (250, 56), "copa": (400, 100), "rte": (2000, 277),
                      "sst2": (2000, 872), "wic": (2000, 638)}
