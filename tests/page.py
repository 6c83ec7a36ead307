"""Reads a page as a browser would, without one."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser makes of a page: text, titles, pictures and tags, which are all closed in turn."""

    def __init__(self, path):
        super().__init__()
        self.path, self.html = path, path.read_text(encoding="utf-8")
        self.text, self.open, self.tags, self.pictures, self.sections = "", [], [], [], []
        self.feed(self.html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "img":
            self.pictures.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.sections.append(data)
        if self.open[-1:] != ["style"]:
            self.text = " ".join(f"{self.text} {data}".split())
