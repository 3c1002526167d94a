"""Prices: a client that reads slowly gets only the newest price of each symbol.

    gunicorn -k gevent examples.prices:app
    curl -N http://127.0.0.1:8000/prices

Prices change 100 times a second; the page at http://127.0.0.1:8000/ updates twice.
"""

import os
import random
import threading
from itertools import count

from flask import Flask

from syncstream import Hub, SSEResponse, sleep

INTERVAL = float(os.environ.get("INTERVAL", 0.01))
THROTTLE = float(os.environ.get("THROTTLE", 0.5))

app = Flask(__name__)
hub = Hub()  # of this process: each worker makes prices of its own


def change():
    prices = {"ACME": 100.0, "INIT": 20.0, "UMBR": 7.0}
    for n in count():
        symbol = random.choice(list(prices))
        prices[symbol] *= random.uniform(0.99, 1.01)
        price = round(prices[symbol], 2)
        hub.publish("prices", {"symbol": symbol, "price": price, "n": n})
        sleep(INTERVAL)


# In each worker. With gunicorn --preload it would have to start after the fork.
threading.Thread(target=change, daemon=True).start()


@app.get("/prices")
def prices():
    # The last hundred contain one of each symbol: the table is full at once.
    newest = hub.subscribe(
        "prices", after=100, conflate=lambda e: e.json()["symbol"], throttle=THROTTLE
    )
    return SSEResponse(newest)


@app.get("/")
def page():
    return """<!doctype html><meta name="viewport" content="width=device-width">
<title>Prices</title>
<table></table>
<script>
  const rows = {}
  new EventSource("/prices").onmessage = (e) => {
    const { symbol, price } = JSON.parse(e.data)
    rows[symbol] ??= document.querySelector("table").insertRow()
    rows[symbol].innerHTML = `<td>${symbol}<td>${price.toFixed(2)}`
  }
</script>"""
