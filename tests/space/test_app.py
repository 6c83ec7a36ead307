"""The page answers in a real browser, as the pipeline does, keeps nothing, and is not brought down."""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from data.film_files import as_dicom, as_file, as_png
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from running import ROOT
from space.serving import Server, open_browser

from cxr_backbone.data.radiographs import MAX_FILE_BYTES, read_radiograph
from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.guard import guarded_pipeline

CHECKPOINT = ROOT / "checkpoints/cxr-inception"
STATEMENT = "Research software, not a medical device."
UNLIKE = "This does not look like a frontal chest X-ray I know."
PATIENT = "Doe^Jane"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    assert server.stop() == 0
    assert not any(path.is_file() for path in server.films.rglob("*"))
    assert "Doe" not in server.log.read_text()


@pytest.fixture(scope="module")
def browser(server):
    with open_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser, server):
    """A function that opens the page in a new window. Afterwards: what did the windows ask the network for?"""
    windows, asked, errors = [], [], []

    def visit(**options):
        window = browser.new_context(**options).new_page()
        windows.append(window)
        window.set_default_timeout(120_000)
        window.on("request", lambda request: asked.append(urlsplit(request.url)))
        window.on("pageerror", lambda error: errors.append(str(error)))
        window.goto(server.url)
        window.locator("#films input[type=file]").wait_for(state="attached")
        return window

    yield visit
    for window in windows:
        assert "Traceback" not in window.content()
        window.context.close()
    assert errors == []
    assert {url.netloc for url in asked if url.scheme not in ("data", "blob")} == {urlsplit(server.url).netloc}
    assert server.films_on_disk == []


def upload(window, *files, cards=None):
    """Uploads (name, bytes) and returns the cards of the answers, when all are there."""
    payload = [{"name": name, "mimeType": "application/octet-stream", "buffer": data} for name, data in files]
    window.set_input_files("#films input[type=file]", payload)
    window.get_by_role("heading", name=files[-1][0], exact=True).wait_for()
    return window.locator(".film").all()


def wait_for(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


@pytest.fixture(scope="module")
def film(shared):
    """A film of a child that the guard knows, in full size."""
    path = sorted((shared / "data/kermany-originals").rglob("*.jp*g"))[0]
    return path.name, path.read_bytes()


@pytest.fixture(scope="module")
def drawing():
    return as_file(draw_phantom(3, opacity=True, image_size=200), "PNG")


def test_a_film_is_answered_with_verdict_picture_probability_and_operating_points(visit, film):
    window = visit()
    assert STATEMENT in window.inner_text("body")
    (card,) = upload(window, film)
    text = card.inner_text()
    assert text.index("This looks like the films") < text.index("calibrated probability")
    for said in ("NORMAL", "PNEUMONIA", "sensitivity>=0.95", "0.955", "0.978", "1044", "what speaks for"):
        assert said in text
    shown, overlay = card.locator("img").all()
    assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [299, 299]
    assert overlay.evaluate("image => getComputedStyle(image).opacity") == "0.5"


def test_an_ankle_is_called_unlike_before_any_probability(visit, shared):
    (path,) = sorted((shared / "data/dicom").glob("*ankle*"))[:1]
    (card,) = upload(visit(), (path.name, path.read_bytes()))
    assert UNLIKE in card.inner_text() and "calibrated probability" not in card.inner_text()
    card.get_by_text("Its scores all the same").click()
    assert "calibrated probability" in card.inner_text()


def test_every_kind_of_file_is_read(visit, drawing):
    pixels = draw_phantom(3, opacity=True, image_size=200)
    deep = pixels.astype(np.uint16) * 16
    kinds = {
        "deep.png": as_file(deep, "PNG"),
        "film.tif": as_file(deep, "TIFF"),
        "film.dcm": as_dicom(deep, bits=12, PatientName=PATIENT),
        "no-ending": as_dicom(deep, bits=12, PatientName=PATIENT),
    }
    window = visit()
    cards = upload(window, *kinds.items())
    assert [card.locator("h3").inner_text() for card in cards] == list(kinds)
    assert all(UNLIKE in card.inner_text() for card in cards)
    assert "Doe" not in window.content()


def test_what_is_no_film_gets_a_sentence_and_the_next_film_an_answer(visit, drawing):
    window = visit()
    damaged = as_dicom(np.zeros((50, 50), np.uint16), bits=12, PatientName=PATIENT)[:-2000]
    vast = as_png(8, 0, np.zeros((1, 1), np.uint8), size=(100_000, 100_000))
    refused = upload(window, ("text.png", b"no film"), ("damaged.dcm", damaged), ("vast.png", vast), ("empty", b""))
    sentences = [card.locator(".refused").inner_text() for card in refused]
    assert all("Can't read" in sentence for sentence in sentences)
    assert "more than 50,000,000" in sentences[2]
    assert "Doe" not in window.content()
    (card,) = upload(window, ("film.png", drawing))
    assert "calibrated probability" in card.inner_html()


def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(server):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="huge.dcm"\r\n\r\n'
    megabyte, number = bytes(2**20), MAX_FILE_BYTES // 2**20 + 1
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    body = (part for part in (head, *[megabyte] * number, b"\r\n--x--\r\n"))
    connection.request("POST", "/gradio_api/upload", body, headers, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413 and b"maximum allowed size" in response.read()
    assert server.films_on_disk == []


def test_what_is_left_of_an_upload_that_broke_off_goes_with_a_later_film(server, drawing, tmp_path):
    with socket.create_connection(urlsplit(server.url).netloc.split(":")) as connection:
        head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n"
        head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        part = '--x\r\nContent-Disposition: form-data; name="files"; filename="film.dcm"\r\n\r\n'
        connection.sendall(f"{head}{part}{'half a film' * 20_000}".encode())
        wait_for(lambda: server.films_on_disk)
    for left in server.films_on_disk:
        os.utime(left, (0, 0))
    (tmp_path / "film.png").write_bytes(drawing)
    client = Client(server.url, verbose=False, download_files=tmp_path)
    client.predict(handle_file(tmp_path / "film.png"), api_name="/classify")
    assert server.films_on_disk == []


def test_ten_films_are_answered_and_an_eleventh_is_told_why_not(visit, drawing):
    cards = upload(visit(), *[(f"{number}.png", drawing) for number in range(11)])
    assert len(cards) == 11
    assert all("calibrated probability" in card.inner_html() for card in cards[:10])
    assert "10 films at once" in cards[10].inner_text()


def test_two_browsers_at_once_each_get_their_own_answer(visit, drawing):
    windows = [visit(), visit()]
    for number, window in enumerate(windows):
        payload = {"name": f"of window {number}.png", "mimeType": "image/png", "buffer": drawing}
        window.set_input_files("#films input[type=file]", [payload] * 3)
    for number, window in enumerate(windows):
        window.locator(".film").nth(2).wait_for()
        assert {card.locator("h3").inner_text() for card in window.locator(".film").all()} == {
            f"of window {number}.png"
        }


def test_the_keyboard_is_enough(visit, drawing):
    window = visit()

    def tab_to(matches):
        for _ in range(30):
            window.keyboard.press("Tab")
            if window.evaluate(f"(element => {matches})(document.activeElement)"):
                return
        raise AssertionError(f"Tab never came to where {matches}")

    choosers = []
    window.on("filechooser", lambda chooser: choosers.append(chooser))
    for _ in range(60):  # a key that comes while the page is still being put together is lost
        tab_to("element.closest('#films')")
        window.keyboard.press("Enter")
        window.wait_for_timeout(1000)
        if choosers:
            break
    choosers[0].set_files([{"name": "by hand.png", "mimeType": "image/png", "buffer": drawing}])
    window.get_by_role("heading", name="by hand.png").wait_for()
    window.goto(window.url)
    tab_to("element.innerText == 'A drawing with an opacity'")
    window.keyboard.press("Enter")
    window.get_by_role("heading", name="A drawing with an opacity (not an X-ray)").wait_for()
    tab_to("element.type == 'range'")
    window.keyboard.press("ArrowRight")
    overlay = window.locator(".film img").nth(1)
    window.wait_for_function("getComputedStyle(document.querySelectorAll('.film img')[1]).opacity == '0.55'")
    assert overlay.is_visible()


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out_of_a_phone_or_a_desk(visit, film, width):
    window = visit(viewport={"width": width, "height": 800})
    (card,) = upload(window, film)
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    assert all(cell.bounding_box()["height"] < 50 for cell in card.locator("th, td").all())  # no word is broken


def test_a_browser_is_told_to_load_nothing_from_elsewhere(visit, server):
    blocked = "fetch('http://localhost:9').then(() => '', error => String(error))"
    assert "Failed to fetch" in visit().evaluate(blocked)
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    connection.request("GET", "/")
    policy = connection.getresponse().getheader("Content-Security-Policy")
    assert policy.startswith("default-src 'self' ") and "http" not in policy and "*" not in policy


def test_the_api_answers_as_the_pipeline_does(server, film, tmp_path):
    (tmp_path / film[0]).write_bytes(film[1])
    client = Client(server.url, verbose=False, download_files=tmp_path)
    answer = client.predict(handle_file(tmp_path / film[0]), api_name="/classify")
    classify = guarded_pipeline(CHECKPOINT)
    said = classify(read_radiograph(tmp_path / film[0]), top_k=None)
    assert answer["scores"] == pytest.approx({score["label"]: score["score"] for score in said}, abs=1e-5)
    assert answer["out_of_distribution"] == said[0]["out_of_distribution"]
    decision = classify.model.config.decide(said, "sensitivity>=0.95")
    assert {label: points["sensitivity>=0.95"] for label, points in answer["decisions"].items()} == decision
    (tmp_path / "text.png").write_text("no film")
    with pytest.raises(AppError, match=r"Can't read text\.png"):
        client.predict(handle_file(tmp_path / "text.png"), api_name="/classify")


def test_the_api_opens_no_file_that_was_not_uploaded(server, tmp_path):
    (tmp_path / "secret.png").write_bytes(as_file(np.zeros((9, 9), np.uint8), "PNG"))
    body = {"data": [{"path": str(tmp_path / "secret.png"), "meta": {"_type": "gradio.FileData"}}]}
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    connection.request("POST", "/gradio_api/call/classify", json.dumps(body), {"Content-Type": "application/json"})
    event = json.load(connection.getresponse())["event_id"]
    connection.request("GET", f"/gradio_api/call/classify/{event}")
    assert b"event: error" in connection.getresponse().read()
    assert (tmp_path / "secret.png").exists()


def test_its_readme_shows_how_a_program_asks(server, drawing, tmp_path):
    blocks = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "space/README.md").read_text(), flags=re.DOTALL)
    assert blocks[0] == ("bash", "python space/app.py\n")
    (tmp_path / "chest.png").write_bytes(drawing)
    for language, text in blocks[1:]:
        command = ["bash", "-euc"] if language == "bash" else [sys.executable, "-c"]
        text = text.replace("http://127.0.0.1:7860", server.url)
        process = subprocess.run([*command, text], cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0 and "PNEUMONIA" in process.stdout, process.stderr


def test_the_folder_is_a_space_without_change(tmp_path, drawing):
    space = tmp_path / "space"
    shutil.copytree(ROOT / "space", space)
    shutil.copytree(CHECKPOINT, space / "checkpoints/cxr-inception")
    card = (space / "README.md").read_text()
    pinned = re.search(r"^gradio==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"sdk_version: {pinned}\n" in card and "app_file: app.py\n" in card
    server = Server(tmp_path, app="app.py", cwd=space)
    (tmp_path / "film.png").write_bytes(drawing)
    client = Client(server.url, verbose=False, download_files=tmp_path)
    assert client.predict(handle_file(tmp_path / "film.png"), api_name="/classify")["out_of_distribution"]
    assert server.stop() == 0


@pytest.mark.parametrize("model", ["nowhere/at-all", "tests"])
def test_a_model_that_cannot_be_opened_is_named(model):
    command = [sys.executable, "space/app.py", "--model", model]
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 1 and model in process.stderr and "Traceback" not in process.stderr
