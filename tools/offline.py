"""Fail if an HTML page would load anything from another place when it is opened.

Looks at scripts, stylesheets, fonts, images, frames and media, in HTML and CSS; links that a reader clicks are free.
"""
import argparse
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

OUTSIDE = re.compile(r"\s*(?:https?:|ftp:|wss?:)?//", re.I)
LOADING_LINKS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "manifest", "preconnect", "dns-prefetch",
                 "apple-touch-icon", "mask-icon"}
LOADING = {"src", "srcset", "poster", "data", "background", "xlink:href"}
CSS_URL = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", re.I)
JS_URL = re.compile(r"(?:\bimport\b|\bfrom\b|\brequire\b|\bfetch\b|importScripts|\.src\s*=|\.open)[\s(\w'\",]*?['\"`]"
                    r"((?:https?:|wss?:)//[^'\"`]+)")


def css_urls(css):
    "What a stylesheet loads."
    return [a or b for a, b in CSS_URL.findall(re.sub(r"/\*.*?\*/", "", css, flags=re.S))]


class Loads(HTMLParser):
    "Collects what a page loads."
    def __init__(self, page):
        super().__init__()
        self.urls, self.inside = [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = {k: v or "" for k, v in attrs}
        self.inside = tag if tag in ("script", "style") else None
        for name in LOADING & given.keys():
            parts = given[name].split(",") if name == "srcset" else [given[name]]
            self.urls += [part.split()[0] for part in parts if part.strip()]
        if tag == "link" and LOADING_LINKS & set(given.get("rel", "").lower().split()): self.urls.append(given.get("href", ""))
        if tag in ("image", "use", "feimage"): self.urls.append(given.get("href", ""))
        self.urls += css_urls(given.get("style", ""))
        if "srcdoc" in given: self.urls += Loads(given["srcdoc"]).urls

    def handle_endtag(self, tag): self.inside = None

    def handle_data(self, data):
        if self.inside == "style": self.urls += css_urls(data)
        if self.inside == "script": self.urls += JS_URL.findall(data)


def outside(path):
    "The addresses of other places that a file loads from."
    content = path.read_text(encoding="utf-8", errors="replace")
    urls = css_urls(content) if path.suffix == ".css" else Loads(content).urls
    return [url for url in urls if OUTSIDE.match(url)]


def problems(folder):
    "One line for each file that would load from elsewhere."
    found = Path(folder).rglob("*") if Path(folder).is_dir() else [Path(folder)]
    files = sorted(p for p in found if p.suffix in (".html", ".css", ".svg"))
    return [f"{path} loads {url}" for path in files for url in dict.fromkeys(outside(path))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="an HTML file or a folder of pages")
    found = problems(parser.parse_args().path)
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__": sys.exit(main())
