-- The tables of a `local:` log, version 1, as 0.1's first releases made them.
PRAGMA journal_mode=WAL;
CREATE TABLE life(empty INTEGER NOT NULL);
CREATE TABLE channel(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
    last INTEGER NOT NULL, nonce INTEGER NOT NULL);
CREATE TABLE event(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, channel INTEGER NOT NULL,
    number INTEGER NOT NULL, nonce INTEGER NOT NULL, prev INTEGER NOT NULL,
    time INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE UNIQUE INDEX event_number ON event(channel, number);
INSERT INTO life VALUES (7);
PRAGMA application_id=1937337955;
PRAGMA user_version=1;
