"""Follow a table without holding a database connection: short sessions, then sleep.

    gunicorn -k gevent examples.database:app
    curl -N http://127.0.0.1:8000/events

``curl -X POST http://127.0.0.1:8000/events/hi`` adds a row; /pool shows the pool.
"""

import os

from flask import Flask
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from examples.shared.same_site import same_site_only
from syncstream import Event, current_stream, sleep, sse

URL = os.environ.get("URL", "sqlite:///rows.sqlite3")
app = Flask(__name__)
app.before_request(same_site_only)
engine = create_engine(URL, pool_size=2, max_overflow=0)


class Base(DeclarativeBase): ...


class Row(Base):
    __tablename__ = "rows"
    id: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[str]


Base.metadata.create_all(engine)


@app.get("/events")
@sse(end="reconnect")
def events():
    id = current_stream().last_event_id or ""
    last = int(id) if id.isdecimal() and len(id) < 19 else 0
    while True:
        query = select(Row).where(Row.id > last).order_by(Row.id).limit(100)
        with Session(engine) as session:  # takes a connection, and gives it back
            rows = session.scalars(query).all()
        for row in rows:
            yield Event(row.data, id=row.id)
            last = row.id
        sleep(float(os.environ.get("INTERVAL", 1)))


@app.post("/events/<data>")
def add(data):
    with Session(engine) as session, session.begin():
        session.add(Row(data=data))
    return "", 201


@app.get("/pool")
def pool():
    return {"checked_out": engine.pool.checkedout()}
