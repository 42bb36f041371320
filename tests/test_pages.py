"""Pages in a real browser: what a person sees of them on a phone and on a desk, by day and by night."""

import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api")

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
LEAST_PIXELS = 12  # of letters

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium; ops/test installs it")

CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgb = colours => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = colours => {
    const [r, g, b] = rgb(colours).map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const page = document.body.appendChild(document.createElement('div'));
  page.style.background = 'Canvas';  // what the browser paints behind everything
  const paper = getComputedStyle(page).backgroundColor;
  return [...document.querySelectorAll('h1, h1 small, p span, p b, p.source, .none')].map(element => {
    const around = [];
    for (let node = element; node instanceof Element; node = node.parentElement)
      around.unshift(getComputedStyle(node).backgroundColor);
    around.unshift(paper);
    const [one, other] = [light(around), light([...around, getComputedStyle(element).color])];
    const contrast = (Math.max(one, other) + .05) / (Math.min(one, other) + .05);
    return [contrast, parseFloat(getComputedStyle(element).fontSize)];
  });
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # as root
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def sheet(vidx, samples_archive, tmp_path_factory):
    """The contact sheet of a search, and what the search found."""
    path = tmp_path_factory.mktemp("sheet") / "found.html"
    command = ["search", "an apple", "a dog", "--archive", str(samples_archive[0]), "--top", "6", "--min-score", "-1"]
    return path, vidx(*command, "--contact-sheet", str(path), "--json").json["moments"]


@pytest.fixture
def page_of(browser):
    """Opens a file; gives the page, and what it asked for besides the file and what it complained of."""
    contexts = []

    def open_file(path, size, scheme="light"):
        context = browser.new_context(viewport=size, color_scheme=scheme, device_scale_factor=2)
        contexts.append(context)
        page, asked, said = context.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url[:60]))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        return page, [url for url in asked if not url.startswith(("data:", "file:"))], said

    yield open_file
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("size", "columns"), [(PHONE, 1), (DESK, 6)], ids=["phone", "desk"])
def test_every_moment_is_seen_with_its_picture_and_time(page_of, sheet, size, columns):
    path, moments = sheet
    page, asked, said = page_of(path, size)
    assert (asked, said) == ([], [])
    cards = page.locator("li")
    assert cards.count() == len(moments) == 6
    boxes = [card.bounding_box() for card in cards.all()]
    assert len({round(box["x"]) for box in boxes}) == columns
    for card, box in zip(cards.all(), boxes, strict=True):
        assert 0 <= box["x"] <= box["x"] + box["width"] <= size["width"]
        width, height = card.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]")
        assert width > 100
        assert height > 50
        assert card.locator("img").bounding_box()["width"] > 150
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing to be pushed aside
    text = page.locator("ol").inner_text()
    assert all(f"{moment['score']:.3f}" in text for moment in moments)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_its_words_can_be_read_by_day_and_by_night(page_of, sheet, scheme):
    page, _, _ = page_of(sheet[0], PHONE, scheme)
    seen = page.evaluate(CONTRASTS)
    assert len(seen) > 10
    assert min(contrast for contrast, _ in seen) >= LEAST_CONTRAST
    assert min(size for _, size in seen) >= LEAST_PIXELS
