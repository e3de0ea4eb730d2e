"""Rows of a database: one SELECT, read as a stream and never more than read.

    sqlite:///crm.db              a file, by Python's own sqlite3; absolute with four slashes
    duckdb:///crm.duckdb          a file, by the package duckdb
    postgresql://me@host/crm      a server, by ADBC; what libpq reads from the environment counts
                                  (PGPASSWORD, PGSSLMODE, ~/.pgpass)

`$NAME` in a url stands for a variable of the environment, each time it is read; so a password is in
no recipe, and messages name a database without it. That a query writes nothing is the database's
own to enforce: the file is opened for reading, PostgreSQL's session allows nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import pyarrow as pa

from ..errors import UserError, one_line
from ..files import file_entry
from .table_cells import CHUNK, RECORDS, from_columns

DRIVERS = {"sqlite": "sqlite3", "duckdb": "duckdb", "postgresql": "adbc_driver_postgresql"}


def check(source: Any, where: str) -> None:
    """What can be known without connecting.

    Raises:
        UserError: the driver is not installed, a variable is not set, or there is no such file.
    """
    scheme = urlsplit(source.url).scheme
    if find_spec(DRIVERS[scheme]) is None:
        raise UserError(f"{where}.url: {scheme} needs: pip install 'gradsmith[sql]'")
    _secrets(source.url, where)
    if scheme != "postgresql":
        _file(source.url, where)


def name_of(url: str) -> str:
    """The database without user, password and options."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def fingerprint(source: Any, where: str) -> dict[str, Any]:
    """What identifies the rows: the query, and the database's file; a server's content is not
    known, so there the query and the name alone."""
    whole, size, count = hashlib.sha256(f"{name_of(source.url)}\0{source.query}".encode()), 0, 0
    if urlsplit(source.url).scheme != "postgresql":
        file = _file(source.url, where)
        for path in (file, file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}.wal")):
            if path.is_file():
                entry = file_entry(path)
                size, count = size + entry["bytes"], count + 1
                whole.update(entry["sha256"].encode())
    return {
        "kind": "sql",
        "path": name_of(source.url),
        "files": count,
        "bytes": size,
        "sha256": whole.hexdigest(),
    }


def batches(source: Any, where: str) -> Iterator[pa.RecordBatch]:
    """The query's rows.

    Raises:
        UserError: it cannot be reached, the query is wrong or would write, or the connection ended
            before its last row.
    """
    scheme = urlsplit(source.url).scheme
    secrets = _secrets(source.url, where)
    read = {"sqlite": _sqlite, "duckdb": _duckdb, "postgresql": _postgresql}[scheme]
    rows = 0
    found = read(source, where)
    try:
        for batch in found:
            yield batch
            rows += batch.num_rows
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each driver has classes of its own, Arrow's are OSErrors too
        told = one_line(str(error), 300)
        for secret in secrets:
            told = told.replace(secret, "***")
        after = f" after {rows:,} rows" if rows else ""
        raise UserError(f"{where}: {name_of(source.url)}{after}: {told}") from None
    finally:
        found.close()


# ------------------------------------------------------------------------------------ databases


def _sqlite(source: Any, where: str) -> Generator[pa.RecordBatch, None, None]:
    import sqlite3

    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION,
               sqlite3.SQLITE_RECURSIVE}  # fmt: skip
    place = quote(str(_file(source.url, where).resolve()))
    with contextlib.closing(sqlite3.connect(f"file:{place}?mode=ro", uri=True)) as connection:
        connection.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY
        )
        try:
            cursor = connection.execute(source.query)
        except sqlite3.DatabaseError as error:
            if "not authorized" in str(error) or "prohibited" in str(error):
                raise _refused(where) from None
            raise
        if cursor.description is None:
            raise _refused(where)
        names = _names([column[0] for column in cursor.description], where)
        while rows := cursor.fetchmany(RECORDS):
            yield from_columns(list(zip(*rows, strict=True)), names)


def _duckdb(source: Any, where: str) -> Generator[pa.RecordBatch, None, None]:
    import duckdb

    statements = duckdb.extract_statements(source.query)
    if len(statements) != 1 or statements[0].type.name != "SELECT":
        raise _refused(where)
    file = _file(source.url, where)
    with contextlib.closing(duckdb.connect(str(file), read_only=True)) as connection:
        connection.execute("SET enable_external_access = false")
        relation = connection.sql(source.query)
        _names(relation.columns, where)
        read = getattr(relation, "to_arrow_reader", None) or relation.fetch_record_batch
        yield from read(CHUNK)


def _postgresql(source: Any, where: str) -> Generator[pa.RecordBatch, None, None]:
    from adbc_driver_postgresql import dbapi

    with dbapi.connect(_uri(source.url, where)) as connection, connection.cursor() as cursor:
        try:
            cursor.execute(source.query)
            reader = cursor.fetch_record_batch()
        except dbapi.Error as error:
            if "read-only transaction" in str(error):
                raise _refused(where) from None
            raise
        names = _names(reader.schema.names, where)
        if not names:
            raise _refused(where)
        for batch in reader:
            columns = [_plain(column) for column in batch.columns]
            yield pa.RecordBatch.from_arrays(columns, names)


def _plain(column: pa.Array) -> pa.Array:
    """numeric, json and others that Arrow has no type for: as the text that they come as."""
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _refused(where: str) -> UserError:
    return UserError(
        f"{where}.query: refused: it is not one SELECT, and what a query changes in a database "
        "stays changed; allowed are queries that only read"
    )


def _names(names: list[str], where: str) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f'{where}.query: the column "{name}" is there twice; give one another name: '
                f'SELECT ... AS "{name}_2"'
            )
    return names


# ----------------------------------------------------------------------------------------- urls


def _file(url: str, where: str) -> Path:
    """
    Raises:
        UserError: there is none.
    """
    parts = urlsplit(url)
    if parts.netloc:
        raise UserError(
            f"{where}.url: found {name_of(url)}; a file comes after three slashes: "
            f"{parts.scheme}:///{parts.netloc}{parts.path}"
        )
    path = Path(_expanded(unquote(parts.path.removeprefix("/")), where)).expanduser()
    if not path.is_file():
        raise UserError(f"{where}.url: no file {path} (from {Path.cwd()})")
    return path


def _uri(url: str, where: str) -> str:
    """What libpq is given: variables put in, and a session that can only read."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    name, colon, password = user.partition(":")
    login = quote(_expanded(unquote(name), where), safe="")
    login += colon + quote(_expanded(unquote(password), where), safe="")
    options = dict(parse_qsl(parts.query))
    options = {key: _expanded(value, where) for key, value in options.items()}
    only = "-c default_transaction_read_only=on"
    options["options"] = f"{options.get('options', '')} {only}".strip()
    place = f"{_expanded(host, where)}{_expanded(parts.path, where)}"
    return f"postgresql://{login}{at}{place}?{urlencode(options, quote_via=quote)}"


VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def _expanded(text: str, where: str) -> str:
    """
    Raises:
        UserError: a variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(f"{where}.url: the variable ${name} is not set")
        return os.environ[name]

    return VARIABLE.sub(value, text)


def _secrets(url: str, where: str) -> list[str]:
    """What no message may show: the values of all variables in the url, and PGPASSWORD."""
    found = [_expanded(match[0], where) for match in VARIABLE.finditer(url)]
    found.append(os.environ.get("PGPASSWORD", ""))
    found += [quote(value, safe="") for value in found]
    return sorted({value for value in found if value}, key=len, reverse=True)
