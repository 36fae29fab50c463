"""Opens the admin page in a real browser, chromium without a window, and fails when it does not
show what it is to show or when its script throws."""

import html
import http.server
import os
import re
import subprocess
import sys
import tempfile
import threading
import urllib.request

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))
import kestrel


def free_port():
    with http.server.HTTPServer(("127.0.0.1", 0), None) as server:
        return server.server_port


def seen(browser, url, profile, budget=5000):
    """The page as it is after some seconds, and what the browser's console says."""
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--enable-logging=stderr", "--v=0", "--user-data-dir=" + profile,
         "--virtual-time-budget=%d" % budget, "--dump-dom", url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


def text_of(page):
    """The cells of each row of the table, and the text of some elements by id."""
    body = re.search(r'<tbody id="queues">(.*?)</tbody>', page, re.S)[1]
    rows = [[html.unescape(re.sub("<[^>]*>", "", cell)).strip()
             for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)]
            for row in re.findall(r"<tr>(.*?)</tr>", body, re.S)]
    parts = {name: html.unescape(re.search(r'id="%s"[^>]*>(.*?)<' % name, page)[1])
             for name in ("status", "problem", "shown")}
    return rows, parts


# What a user does while the page is refreshed: a button is pressed for longer than that takes, has
# the focus, and its row must still be the same one; then one queue is looked at.
USER = """
const told = document.createElement("p")
told.id = "told"
document.body.append(told)
function tell(what) { told.textContent += what + ";" }
setTimeout(() => {
  const row = [...document.getElementById("queues").children].find(
    row => row.firstChild.textContent === "a"), button = row.querySelector("button")
  button.focus()
  setTimeout(() => {
    tell(row.isConnected ? "row stays" : "row gone")
    tell(document.activeElement === button ? "focus stays" : "focus lost")
    tell(/last answer/.test(document.getElementById("answer").textContent) ? "age shown" : "no age")
    button.click()
    setTimeout(() => {
      tell(document.getElementById("view").open ? "view open" : "no view")
      tell(document.getElementById("items").textContent)
      tell(location.search)
      for (const one of document.querySelectorAll("#actions button"))
        if (one.textContent === "Flush") one.click()
      tell(document.getElementById("question").textContent)
      tell(document.getElementById("no").textContent)
      tell(document.title)
    }, 1500)
  }, 5000)
}, 1500)
"""


class Proxy(http.server.BaseHTTPRequestHandler):
    """The page with a script that does what a user does; all else comes from the server."""

    def do_GET(self):
        body = urllib.request.urlopen(self.server.url + self.path[1:]).read()
        if self.path == "/":
            body = body.replace(b"</html>", b"<script>%b</script></html>" % USER.encode())
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class Dead(http.server.BaseHTTPRequestHandler):
    """A server that gives the page and then nothing."""

    def do_GET(self):
        self.send_response(200 if self.path == "/" else 503)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(kestrel._PAGE.encode() if self.path == "/" else b"gone")

    def log_message(self, *arguments):
        pass


def main(browser):
    weird = "<img src=x onerror=alert(1)>&\"'"
    port = free_port()
    with tempfile.TemporaryDirectory() as work:
        config = os.path.join(work, "kestrel.conf")
        with open(config, "w") as file:
            file.write("[server]\nadmin_port = %d\n" % port)
        url = "http://127.0.0.1:%d/" % port
        profile = os.path.join(work, "profile")
        with kestrel.serve(config=config) as server, kestrel.Client(port=server.port) as client:
            page, console = seen(browser, url, profile)
            rows, parts = text_of(page)
            assert not rows and parts["shown"].startswith("No queues yet"), (rows, parts)
            assert not console, console
            for number in range(4321):
                client.put("deep", b"xy")
            client.put("other", b"<script>throw 1</script>")
            client.put(weird.replace(" ", "_").replace(".", ""), b"x")
            client.get("other", 0, "/open")
            page, console = seen(browser, url, profile)
            rows, parts = text_of(page)
            names = {row[0]: row for row in rows}
            assert names["deep"][1] == "4,321", rows
            assert names["other"][1] == "0" and names["other"][6] == "1", rows
            assert weird.replace(" ", "_") in names, rows
            assert "<img" not in page and parts == {
                "status": "up", "problem": "", "shown": ""}, parts
            assert not console, console
            with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
                proxy.url = url
                threading.Thread(target=proxy.serve_forever, daemon=True).start()
                client.put("a", b'{"large": "' + b"x" * 3000)
                page, console = seen(browser, "http://127.0.0.1:%d/" % proxy.server_port, profile,
                                     12000)
                told = html.unescape(re.search('id="told">(.*?)</p>', page, re.S)[1])
                for what in ("row stays", "focus stays", "age shown", "view open",
                             "The first 2,000 of 3,011 bytes", "queue=a", "Drop the 1 items of a?",
                             "Cancel", os.uname().nodename + ": Kestrel, up"):
                    assert what in told, (what, told, console)
                proxy.shutdown()
            client.delete("a")
            for number in range(1000):
                client.put("queue%04d" % number, b"x")
            page, console = seen(browser, url, profile)
            rows, parts = text_of(page)
            assert len(rows) == 200 and "of 1003" in parts["shown"], (len(rows), parts)
            assert not console, console
            assert urllib.request.urlopen(url + "ping").read() == b"pong\n"
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dead) as dead:
            threading.Thread(target=dead.serve_forever, daemon=True).start()
            page, _ = seen(browser, "http://127.0.0.1:%d/" % dead.server_port, profile)
            rows, parts = text_of(page)
            assert parts["status"] == "unreachable" and parts["problem"] == "The server says 503: gone", (
                parts)
            dead.shutdown()
    print("the page shows what it is to show")


if __name__ == "__main__":
    main(sys.argv[1])
