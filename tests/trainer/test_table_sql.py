"""`kind: sql`: SQLite, DuckDB and a real PostgreSQL are read, and nothing is written or told."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import table_recipes
from conftest import with_overrides
from table_recipes import people

from gradsmith.data import sql
from gradsmith.data.prepare import prepare
from gradsmith.data.prepared import PreparedData
from gradsmith.data.sources import check_sources
from gradsmith.errors import UserError
from gradsmith.recipe import Recipe, parse_recipe

QUERY = 'SELECT age, income, city, since, "left", spent FROM people ORDER BY income'
WRITES = [
    "DELETE FROM people",
    "INSERT INTO people (age) VALUES (1)",
    "CREATE TABLE other (a INT)",
    "DROP TABLE people",
    "WITH gone AS (SELECT 1) UPDATE people SET age = 1",
]


def cells() -> list[tuple[Any, ...]]:
    """Rows as databases have them: numbers are numbers, and what is missing is NULL."""
    return [
        (
            None if row["age"] == "" else float(row["age"]),
            row["income"],
            row["city"] or None,
            row["since"],
            row["left"] == "yes",
            row["spent"],
        )
        for row in people(300)
    ]


def recipe(output: Path, url: str, query: str = QUERY, **data: Any) -> Recipe:
    tree = table_recipes.recipe(output, Path("none.csv"), "spent").dump()
    source = {"kind": "sql", "url": url, "query": query}
    return parse_recipe(
        with_overrides(tree, {"data.sources": [source], "output": str(output), **data})
    )


def made(output: Path, url: str, query: str = QUERY) -> PreparedData:
    return prepare(recipe(output, url, query), log=lambda _: None)


def read(url: str, query: str) -> pa.Table:
    source = parse_recipe(recipe(Path("run"), url, query).dump()).data.sources[0]
    return pa.Table.from_batches(sql.batches(source, "data.sources.0"))


def equal(one: PreparedData, other: PreparedData) -> None:
    for name in ("train", "validation", "test"):
        for column in ("numbers", "categories", "target"):
            found = (np.asarray(getattr(data.split(name), column)) for data in (one, other))
            np.testing.assert_array_equal(*found)


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sql") / "people.db"
    with sqlite3.connect(path) as connection:
        connection.execute(
            'CREATE TABLE people (age REAL, income REAL, city TEXT, since TEXT, "left" BOOL, '
            "spent REAL)"
        )
        connection.executemany("INSERT INTO people VALUES (?, ?, ?, ?, ?, ?)", cells())
    connection.close()
    return f"sqlite:///{path}"


@pytest.fixture(scope="module")
def duckdb(tmp_path_factory: pytest.TempPathFactory) -> str:
    import duckdb as module

    path = tmp_path_factory.mktemp("sql") / "people.duckdb"
    with module.connect(str(path)) as connection:
        connection.execute(
            "CREATE TABLE people (age DOUBLE, income DECIMAL(18, 2), city TEXT, since DATE, "
            '"left" BOOL, spent DOUBLE)'
        )
        connection.executemany("INSERT INTO people VALUES (?, ?, ?, ?, ?, ?)", cells())
    return f"duckdb:///{path}"


def test_sqlite_is_read_and_prepared_again_only_when_it_changes(
    sqlite: str, tmp_path: Path
) -> None:
    data = made(tmp_path / "run", sqlite)
    rows = sum(split["documents"] for split in data.manifest["splits"].values())
    assert rows == 300
    (entry,) = data.manifest["sources"]
    assert (entry["kind"], entry["path"], entry["files"]) == ("sql", sqlite, 1)
    said: list[str] = []
    prepare(recipe(tmp_path / "run", sqlite), log=said.append)
    assert said == []
    with sqlite3.connect(sqlite.removeprefix("sqlite:///")) as connection:
        connection.execute("UPDATE people SET income = income + 0.5 WHERE age > 40")
    connection.close()
    prepare(recipe(tmp_path / "run", sqlite), log=said.append)
    assert "the sources have changed: preparing again" in said


def test_duckdb_gives_what_sqlite_gives(sqlite: str, duckdb: str, tmp_path: Path) -> None:
    query = 'SELECT age, city, since, CAST("left" AS INT) AS "left", spent FROM people'
    query += " ORDER BY spent, since"
    equal(made(tmp_path / "one", sqlite, query), made(tmp_path / "other", duckdb, query))


@pytest.mark.parametrize("query", [*WRITES, "PRAGMA user_version = 3", "ATTACH 'x.db' AS other"])
def test_a_query_that_writes_is_refused_by_sqlite(sqlite: str, query: str) -> None:
    before = Path(sqlite.removeprefix("sqlite:///")).read_bytes()
    with pytest.raises(UserError, match=r"data.sources.0.query: refused: it is not one SELECT"):
        read(sqlite, query)
    assert Path(sqlite.removeprefix("sqlite:///")).read_bytes() == before


@pytest.mark.parametrize("query", [*WRITES, "COPY people TO 'x.csv'", "SELECT 1; SELECT 2"])
def test_a_query_that_writes_is_refused_by_duckdb(duckdb: str, query: str) -> None:
    with pytest.raises(UserError, match=r"refused: it is not one SELECT"):
        read(duckdb, query)
    with pytest.raises(UserError, match="disabled"):
        read(duckdb, "SELECT * FROM read_csv('/etc/passwd')")


def test_what_is_wrong_with_a_query_is_said(sqlite: str, tmp_path: Path) -> None:
    for query, words in [
        ("SELECT * FROM persons", r"people.db: no such table: persons"),
        ("SELEC 1", "syntax error"),
        ("SELECT 1 AS a, 2 AS a", 'the column "a" is there twice'),
        ("SELECT x'00ff' AS a", 'column "a": of type binary; allowed are numbers'),
    ]:
        with pytest.raises(UserError, match=words):
            made(tmp_path / "run", sqlite, query)
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"url": "sqlite:///none.db"}, "data.sources.0.url: no file none.db"),
        ({"url": "sqlite://none.db"}, "a file comes after three slashes: sqlite:///none.db"),
        ({"url": "mysql://host/db"}, "found the scheme mysql; allowed are sqlite://, duckdb://"),
        ({"url": "postgresql://me:hunter2@host/db"}, "holds a password, which would be kept"),
        ({"url": "postgresql://me@host/db?password=hunter2"}, "holds a password, which would be"),
        ({"url": "sqlite:///$GRADSMITH_NOWHERE/a.db"}, r"variable \$GRADSMITH_NOWHERE is not set"),
        ({"query": None}, "kind sql needs a query"),
        ({"path": "a.csv"}, "path does not go with kind sql"),
        ({"kind": "csv", "path": "a.csv", "query": None}, "kind csv does not go with url"),
    ],
)
def test_sources_that_cannot_be(tmp_path: Path, source: dict[str, Any], words: str) -> None:
    tree = recipe(tmp_path / "run", "sqlite:///a.db").dump()
    tree["data"]["sources"][0].update(source)
    with pytest.raises(UserError, match=words) as raised:
        check_sources(parse_recipe(tree).data)
    assert "hunter2" not in str(raised.value)


# ---------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """A server of its own; user gs, whose password is in GS_PASSWORD."""
    pytest.importorskip("adbc_driver_postgresql")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or (os.geteuid() == 0 and not shutil.which("runuser")):
        pytest.skip("PostgreSQL is not installed here")
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)  # the server has a user of its own
        secret, data = Path(folder, "secret"), Path(folder, "data")
        secret.write_text("s3cret/:@ word\n")

        def run(program: str, *more: str) -> None:
            command = [*as_user, str(programs[-1] / program), "-D", str(data), *more]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")

        run("initdb", "-A", "scram-sha-256", f"--pwfile={secret}", "-U", "gs", "--no-sync", "-E",
            "UTF8")  # fmt: skip
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
        run("pg_ctl", "-w", "-l", f"{folder}/data/log", "-o", settings, "start")
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("GS_PASSWORD", "s3cret/:@ word")
                patch.setenv("GS_PORT", str(port))
                yield "postgresql://gs:$GS_PASSWORD@127.0.0.1:${GS_PORT}/postgres"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")


@pytest.fixture(scope="module")
def filled(postgresql: str) -> str:
    from adbc_driver_postgresql import dbapi

    writable = sql._uri(postgresql, "").replace("only%3Don", "only%3Doff")
    with dbapi.connect(writable) as connection, connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE people (age float8, income numeric, city text, since date, "
            '"left" bool, spent float8)'
        )
        for row in cells():
            fixed = (*row[:1], str(row[1]), row[2], date.fromisoformat(row[3]), *row[4:])
            cursor.execute(
                "INSERT INTO people VALUES ($1, $2::text::numeric, $3, $4, $5, $6)", fixed
            )
        cursor.execute("CREATE FUNCTION empties() RETURNS int LANGUAGE sql AS "
                       "'DELETE FROM people; SELECT 1'")  # fmt: skip
        connection.commit()
    return postgresql


def test_postgresql_gives_what_sqlite_gives(filled: str, sqlite: str, tmp_path: Path) -> None:
    order = 'SELECT age, city, since, CAST("left" AS INT) AS "left", spent FROM people'
    order += " ORDER BY spent, since"
    equal(made(tmp_path / "one", filled, order), made(tmp_path / "other", sqlite, order))


def test_types_of_postgresql(postgresql: str) -> None:
    query = (
        "SELECT 1::int2 AS small, 2::int8 AS large, 1.5::float4 AS half, 12.25::numeric AS price, "
        "true AS yes, 'a'::varchar AS word, 'x'::char(1) AS letter, DATE '2024-02-29' AS day, "
        "TIMESTAMP '2024-02-29 12:30' AS moment, '{\"a\": 1}'::jsonb AS object, NULL::int AS none"
    )
    (row,) = read(postgresql, query).to_pylist()
    assert row["price"] == "12.25"  # text: a number in it is found as one in a CSV's is
    assert Decimal(row["price"]) == Decimal("12.25")
    assert row["day"] == date(2024, 2, 29)
    assert row["object"] == '{"a": 1}'
    found = [row[name] for name in ("small", "large", "half", "yes", "none")]
    assert found == [1, 2, 1.5, True, None]


@pytest.mark.parametrize("query", [*WRITES, "SELECT empties()", "COPY people TO STDOUT"])
def test_a_query_that_writes_is_refused_by_postgresql(filled: str, query: str) -> None:
    with pytest.raises(UserError, match=r"data.sources.0"):
        read(filled, query)
    with pytest.raises(UserError, match=r"data.sources.0"):
        read(filled, "SELECT set_config('transaction_read_only', 'off', true), empties()")
    assert read(filled, "SELECT count(*) AS n FROM people").to_pylist() == [{"n": 300}]


def test_no_message_shows_a_password(
    postgresql: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GS_PASSWORD", "wr0ng-pa55")
    monkeypatch.setenv("PGPASSWORD", "other-pa55")
    with pytest.raises(UserError, match="authentication failed") as raised:
        made(tmp_path / "run", postgresql)
    assert "pa55" not in str(raised.value)
    monkeypatch.setenv("GS_PORT", "1")
    with pytest.raises(UserError, match=r"data.sources.0: postgresql://127.0.0.1") as raised:
        made(tmp_path / "run", postgresql)
    assert "pa55" not in str(raised.value)


def test_a_connection_that_ends_half_way_leaves_nothing(filled: str, tmp_path: Path) -> None:
    query = (
        "SELECT n AS age, n AS spent, pg_terminate_backend(pg_backend_pid()) AS gone "
        "FROM generate_series(1, 100000) AS n"
    )
    with pytest.raises(UserError, match=r"data.sources.0: postgresql://"):
        made(tmp_path / "run", filled, query)
    assert not (tmp_path / "run" / "data").exists()


def test_a_password_is_in_no_file_of_the_run(filled: str, tmp_path: Path) -> None:
    made(tmp_path / "run", filled)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"s3cret" not in path.read_bytes(), path
    assert "GS_PASSWORD" not in str(PreparedData.open(tmp_path / "run" / "data").manifest)
