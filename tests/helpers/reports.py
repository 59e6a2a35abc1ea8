"""Whether the JSON and the pages that commands write are well-formed."""

from html.parser import HTMLParser

NUMBER = (int, float)
MAYBE = (int, float, None)


def check(value, schema, path="$"):
    """A small schema: types, {key: schema}, [schema of every item], (alternatives)"""
    if isinstance(schema, tuple):
        if schema and all(isinstance(s, type) or s is None for s in schema):
            kinds = tuple(type(None) if s is None else s for s in schema)
            assert isinstance(value, kinds), f"{path}: {value!r}"
            return
        raise AssertionError(f"bad schema at {path}")
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        assert set(value) == set(schema), f"{path}: {set(value) ^ set(schema)}"
        for key, inner in schema.items():
            check(value[key], inner, f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), path
        for index, item in enumerate(value):
            check(item, schema[0], f"{path}[{index}]")
    else:
        assert isinstance(value, schema), f"{path}: {value!r}"


class Page(HTMLParser):
    """Which elements a page has, its text, and whether every element is closed"""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.outside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
