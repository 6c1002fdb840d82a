"""Downloads from a server on this machine that stalls, breaks off, changes its mind and asks for a log-in."""

import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import types
import zipfile

import pytest
import requests

from data_prep import locks
from data_prep.fetch import archives, download
from tests.data_prep.builds import ROOT
from usfmae_jax.errors import InputError

DATA = bytes(range(256)) * 8000  # 2 MB
SHA256 = hashlib.sha256(DATA).hexdigest()
MD5 = hashlib.md5(DATA).hexdigest()


class Site(http.server.ThreadingHTTPServer):
    """Serves `files` at `url`; `faults` are taken from the front, one a request, and then all is well.

    A fault is a status and its headers, or the number of bytes after which the connection breaks. `hook` sees every
    request first, and may answer it. `seen` are the headers of all requests.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.faults, self.seen = {"/a.bin": DATA}, [], []
        self.headers = {"ETag": '"1"', "Content-Type": "application/octet-stream"}
        self.ranges = self.lengths = True
        self.hook = lambda handler: False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        """Silent: in some tests the other side goes away."""


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        site = self.server
        site.seen.append(dict(self.headers))
        if site.hook(self):
            return
        fault = site.faults.pop(0) if site.faults else None
        if isinstance(fault, tuple):
            status, headers = fault
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = site.files[self.path]
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        fresh = self.headers.get("If-Range") in (site.headers.get("ETag"), site.headers.get("Last-Modified"))
        if not (site.ranges and fresh):
            start = 0
        if start and start >= len(data):
            self.send_response(416)
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if site.lengths:
            self.send_header("Content-Length", str(len(data) - start))
        for name, value in site.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[start : start + fault] if fault else data[start:])


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The pauses that were asked for; none is kept."""
    asked = []
    monkeypatch.setattr(download, "_pause", asked.append)
    return asked


def fetch(url, target, *, sha256="", md5="", size=0):
    """One file of a dataset."""
    one = types.SimpleNamespace(url=url, file=target.name, sha256=sha256, md5=md5, bytes=size, extract=False)
    return download.fetch_all([one], target.parent)


def refused(site, target, url="/a.bin", **expected):
    with pytest.raises(InputError) as caught:
        fetch(site.url + url, target, **expected)
    return str(caught.value)


def ranges(site):
    return [headers.get("Range", "") for headers in site.seen]


def entry(site, file, data, *, extract=True, **checks):
    site.files[f"/{file}"] = data
    plain = {"sha256": "", "md5": "", "bytes": 0}
    return types.SimpleNamespace(url=f"{site.url}/{file}", file=file, extract=extract, **plain | checks)


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def test_a_file_arrives_whole_and_alone(site, tmp_path):
    target = tmp_path / "new/a.bin"
    expected = [{"file": "a.bin", "sha256": SHA256, "bytes": len(DATA)}]
    assert fetch(f"{site.url}/a.bin", target, sha256=SHA256.upper(), md5=MD5, size=len(DATA)) == expected
    assert target.read_bytes() == DATA
    assert os.listdir(target.parent) == ["a.bin"]
    assert ranges(site) == [""]


def test_a_file_with_the_right_checksum_is_not_fetched_again(site, tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA)
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    assert site.seen == []


def test_another_file_of_that_name_is_left_alone(site, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"mine")
    assert "expected 2,048,000: move it away" in refused(site, tmp_path / "a.bin", size=len(DATA))
    assert f"expected {SHA256}" in refused(site, tmp_path / "a.bin", sha256=SHA256)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"
    assert site.seen == []


@pytest.mark.parametrize("version", [{"ETag": '"1"'}, {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}])
def test_a_broken_connection_is_taken_up_where_it_broke(site, tmp_path, waits, version):
    site.headers, site.faults = version, [700_000, 500_000]
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert ranges(site) == ["", "bytes=700000-", "bytes=1200000-"]
    assert site.seen[1]["If-Range"] == next(iter(version.values()))
    assert waits == [1, 1]  # something arrived: patience starts anew


def test_a_changed_file_starts_over(site, tmp_path, monkeypatch):
    site.faults = [700_000]
    new = DATA[::-1]

    def change(_):
        site.files["/a.bin"], site.headers = new, {"ETag": '"2"'}

    monkeypatch.setattr(download, "_pause", change)
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == new
    assert ranges(site) == ["", "bytes=700000-"]


def test_a_server_that_sends_parts_of_another_version_is_not_believed(site, tmp_path, monkeypatch):
    site.faults = [700_000]
    new = DATA[::-1]

    def change(_):
        site.files["/a.bin"], site.headers = new, {"ETag": '"2"'}

    def ignore_if_range(handler):
        if handler.headers.get("If-Range"):
            handler.headers.replace_header("If-Range", site.headers["ETag"])

    site.hook = ignore_if_range
    monkeypatch.setattr(download, "_pause", change)
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == new
    assert ranges(site) == ["", "bytes=700000-", ""]


def test_a_server_without_ranges_or_lengths_or_versions_still_serves(site, tmp_path):
    site.ranges, site.faults = False, [700_000]
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin")
    site.lengths, site.faults = False, [700_000]
    fetch(f"{site.url}/a.bin", tmp_path / "b.bin", size=len(DATA))
    site.headers, site.ranges, site.faults = {"ETag": 'W/"1"'}, True, [700_000]
    fetch(f"{site.url}/a.bin", tmp_path / "c.bin", size=len(DATA))
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {DATA}
    assert ranges(site)[-1] == ""  # what cannot be told apart is not joined


def test_busy_servers_are_asked_again_after_the_time_they_ask_for(site, tmp_path, waits):
    site.faults = [(503, {}), (503, {"Retry-After": "7"}), (429, {"Retry-After": "0"}), (500, {"Retry-After": "soon"})]
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    assert waits == [1, 7, 4, 8]


def test_a_server_that_asks_for_hours_is_left_alone(site, tmp_path, waits):
    site.faults = [(429, {"Retry-After": "7200"})]
    assert "asks to wait 120 minutes" in refused(site, tmp_path / "a.bin")
    assert waits == []


def test_tries_come_to_an_end_and_the_next_run_goes_on(site, tmp_path, waits):
    site.faults = [700_000] + [(502, {})] * 7
    assert "502" in refused(site, tmp_path / "a.bin")
    assert waits == [1, 2, 4, 8, 16, 32, 60]
    assert sorted(os.listdir(tmp_path)) == ["a.bin.part", "a.bin.part.json"]
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    assert ranges(site)[-1] == "bytes=700000-"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_silent_server_times_out_and_is_asked_again(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUTS", (1, 0.1))
    site.hook = lambda handler: len(site.seen) == 1 and not threading.Event().wait(0.5)
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    assert len(site.seen) == 2


def test_an_address_without_a_server_gives_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(InputError, match=r"cannot be fetched \(.*refused.*run the same command again"):
        fetch("http://127.0.0.1:1/a.bin", tmp_path / "a.bin")
    assert os.listdir(tmp_path) == []


def test_a_wrong_checksum_keeps_the_file_aside_and_says_both(site, tmp_path):
    message = refused(site, tmp_path / "a.bin", sha256="0" * 64)
    assert SHA256 in message
    assert "0" * 64 in message
    assert os.listdir(tmp_path) == ["a.bin.bad"]
    assert MD5 in refused(site, tmp_path / "a.bin", md5="0" * 32)


def test_a_wrong_size_is_noticed_before_anything_is_fetched(site, tmp_path):
    assert "offers 2,048,000 bytes, expected 5" in refused(site, tmp_path / "a.bin", size=5)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_noticed_before_anything_is_fetched(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    assert "0.0 GB are free" in refused(site, tmp_path / "a.bin")
    assert os.listdir(tmp_path) == []


def test_redirects_are_followed_but_not_to_files_or_for_ever(site, tmp_path):
    site.faults = [(302, {"Location": "/elsewhere/../a.bin"}), (307, {"Location": f"{site.url}/a.bin"})]
    fetch(f"{site.url}/first", tmp_path / "a.bin", sha256=SHA256)
    for address in ("file:///etc/passwd", "ftp://127.0.0.1/a"):
        site.faults = [(302, {"Location": address})]
        assert "only http and https" in refused(site, tmp_path / "b.bin")
    site.faults = [(301, {"Location": "/a.bin"})] * 20
    assert "more than 10 times" in refused(site, tmp_path / "b.bin")
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/a", "/etc/passwd", "http://", ""])
def test_addresses_that_are_not_of_the_web_are_refused(tmp_path, url):
    with pytest.raises(InputError):
        fetch(url, tmp_path / "a.bin")
    assert os.listdir(tmp_path) == []


def test_a_secure_address_that_leads_to_an_insecure_one_is_refused(tmp_path, monkeypatch):
    def redirect(_, request, **__):
        response = requests.Response()
        response.status_code, response.raw, response.url, response.request = 302, io.BytesIO(), request.url, request
        response.headers["Location"] = "http://127.0.0.1:1/a.bin"
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", redirect)
    for scheme in ("https", "HTTPS"):
        with pytest.raises(InputError, match="from https to http"):
            fetch(f"{scheme}://127.0.0.1/a.bin", tmp_path / "a.bin")


def test_a_log_in_page_instead_of_the_file_is_explained_and_does_not_replace_what_arrived(site, tmp_path):
    site.faults = [700_000] + [(502, {})] * 7
    refused(site, tmp_path / "a.zip")
    site.files["/login"], site.headers = b"\n<!DOCTYPE html><title>Log in</title>", {"Content-Type": "image/png"}
    site.faults = [(302, {"Location": "/login"})]
    message = refused(site, tmp_path / "a.zip")
    assert "a web page instead of the file" in message
    assert "a.zip" in message
    assert (tmp_path / "a.zip.part").stat().st_size == 700_000
    site.headers = {"Content-Type": "text/html; charset=utf-8"}
    site.files["/a.bin"] = b"please log in"
    assert "a web page instead of the file" in refused(site, tmp_path / "b.zip")


def test_a_zip_that_is_called_a_web_page_by_its_server_is_taken(site, tmp_path):
    site.headers["Content-Type"] = "text/html"
    site.files["/a.zip"] = zipped(a=b"1")
    fetch(f"{site.url}/a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_says_what_to_do_by_hand_and_is_not_repeated(site, tmp_path, status):
    site.faults = [(status, {})]
    message = refused(site, tmp_path / "a.bin")
    assert str(status) in message
    assert "download the file there" in message
    assert len(site.seen) == 1


def test_a_part_of_another_address_is_not_continued(site, tmp_path):
    site.files["/b.bin"] = DATA[::-1]
    site.faults = [700_000] + [(502, {})] * 7
    refused(site, tmp_path / "a.bin")
    fetch(f"{site.url}/b.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA[::-1]


def test_ctrl_c_leaves_a_part_that_the_next_run_continues(site, tmp_path, monkeypatch):
    site.faults = [700_000]

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_pause", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{site.url}/a.bin", tmp_path / "a.bin")
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    assert ranges(site) == ["", "bytes=700000-"]


def test_two_downloads_into_one_folder_do_not_mix(site, tmp_path):
    with locks.hold(tmp_path, "another download"):
        assert "another download" in refused(site, tmp_path / "a.bin")
        with pytest.raises(InputError, match="another download"):
            download.fetch_all([entry(site, "b.bin", DATA)], tmp_path)
    assert site.seen == []
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin")


def test_all_files_of_a_dataset_are_fetched_and_unpacked_once(site, tmp_path):
    archive = zipped(**{"images/1.png": b"1", "../evil": b"2"})
    digest = hashlib.sha256(archive).hexdigest()
    wanted = [
        entry(site, "set.zip", archive, sha256=digest, bytes=len(archive)),
        entry(site, "table.csv", b"a,b", extract=False),
    ]
    expected = [
        {"file": "set.zip", "sha256": digest, "bytes": len(archive)},
        {"file": "table.csv", "sha256": hashlib.sha256(b"a,b").hexdigest(), "bytes": 3},
    ]
    assert download.fetch_all(wanted, tmp_path / "in") == expected
    assert (tmp_path / "in/set/images/1.png").read_bytes() == b"1"
    assert (tmp_path / "in/table.csv").read_bytes() == b"a,b"
    assert [one.source for one in download.rejected_members(tmp_path / "in")] == ["set.zip/../evil"]
    (tmp_path / "in/set.zip").unlink()  # has done its work
    asked = len(site.seen)
    assert download.fetch_all(wanted, tmp_path / "in") == expected
    assert len(site.seen) == asked


def test_what_is_left_out_of_an_archive_is_said(site, tmp_path, capsys):
    download.fetch_all([entry(site, "set.zip", zipped(**{"1.png": b"1", "../evil": b"2"}))], tmp_path)
    assert "set.zip: 1 members were left out, first 'set.zip/../evil'" in capsys.readouterr().err


def test_an_unpacking_that_was_stopped_is_done_again_without_fetching_again(site, tmp_path, monkeypatch):
    wanted = [entry(site, "set.zip", zipped(**{"1.png": b"1"}))]
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            download.fetch_all(wanted, tmp_path)
    assert os.listdir(tmp_path) == ["set.zip"]
    download.fetch_all(wanted, tmp_path)
    assert (tmp_path / "set/1.png").exists()
    assert len(site.seen) == 1


def test_a_folder_of_another_origin_or_version_is_not_taken_for_the_archive(site, tmp_path):
    data = zipped(**{"1.png": b"1"})
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError, match="was not made by --download"):
        download.fetch_all([entry(site, "set.zip", data)], tmp_path)
    (tmp_path / "set").rmdir()
    download.fetch_all([entry(site, "set.zip", data)], tmp_path)
    with pytest.raises(InputError, match="another version"):
        download.fetch_all([entry(site, "set.zip", data, sha256="0" * 64)], tmp_path)
    assert len(site.seen) == 1


@pytest.mark.parametrize("file", ["../a.zip", "a/b.zip", "/a.zip", ".a.zip", ""])
def test_a_download_cannot_be_named_out_of_its_folder(site, tmp_path, file):
    with pytest.raises(InputError, match="cannot be the name"):
        download.fetch_all([entry(site, file, b"")], tmp_path)


def test_a_killed_download_is_continued(site, tmp_path):
    held = threading.Event()

    def hold(handler):
        if handler.headers.get("Range"):
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.send_header("ETag", '"1"')
        handler.end_headers()
        handler.wfile.write(DATA[:1_500_000])
        return held.wait(10)

    site.hook = hold
    code = "import pathlib; from tests.data_prep.fetch import test_download; "
    code += f"test_download.fetch('{site.url}/a.bin', pathlib.Path('a.bin'))"
    environment = os.environ | {"no_proxy": "*", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    part = tmp_path / "a.bin.part"
    try:
        for _ in range(1000):
            if part.exists() and part.stat().st_size:
                break
            threading.Event().wait(0.01)
    finally:
        process.kill()
        process.communicate()
        held.set()
    there = part.stat().st_size
    assert 0 < there < len(DATA)
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin", sha256=SHA256)
    assert ranges(site) == ["", f"bytes={there}-"]
