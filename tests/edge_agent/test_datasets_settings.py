"""`[data]` in `agent.toml`: it reads naturally, and what is wrong in it is named."""

from __future__ import annotations

import tomllib

import pytest
from pydantic import ValidationError

from edge_agent.datasets import DataSettings


def parse(toml: str) -> DataSettings:
    return DataSettings.model_validate(tomllib.loads(toml))


def test_every_kind_reads_naturally() -> None:
    builtin = parse('name = "uci-har"\nindex = 3\ncount = 30\npartition = "natural"\nlimit = 2000')
    assert (builtin.kind, builtin.share.index, builtin.share.partition) == ("builtin", 3, "natural")
    file = parse('name = "mine.npz"\npartition = "by:person"\nsplit = "fold"\nx = "signal"\ncount = 4')
    assert (file.share.partition, file.split, file.x) == ("by:person", "fold", "signal")
    assert parse('kind = "npz"\npath = "mine.npz"\nlabels = ["no", "yes"]').labels == ("no", "yes")
    table = parse('kind = "csv"\npath = "mine.csv"\nlabel = "state"\ncolumns = ["a", 2]\nshape = [1, 2]')
    assert table.columns == ("a", 2)
    assert parse('kind = "csv"\npath = "mine.csv"\nlabel = -1\nheader = false').label == -1
    assert parse('kind = "image_folder"\npath = "cats"\nsize = [32, 24]').size == (32, 24)
    assert parse('kind = "python"\nfunction = "mine:load"').function == "mine:load"
    stream = parse(
        'kind = "mqtt_stream"\ntopic = "home/belt"\nlabel_topic = "home/label"\nfields = ["ax", "ay"]\n'
        "window = 64\nstride = 32\nsample_rate_hz = 50\nbuffer_mb = 4"
    )
    assert stream.fields == ("ax", "ay")


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ('kind = "npz"\npaht = "x.npz"', "paht"),
        ('kind = "csv"', "needs path"),
        ('kind = "mqtt_stream"\ntopic = "a"', "needs fields and label_topic"),
        ('kind = "csv"\npath = "x"\ntopic = "a"', "topic: not a key of kind = 'csv'"),
        ('labels = ["a", "b"]', "labels: not a key of kind = 'builtin'"),
        ("validation = 0.5\ntest = 0.5", "leave nothing to train on"),
        ('partition = "natrual"', "is none of 'iid'.*did you mean 'natural'"),
        ('partition = "by:"', "is none of 'iid'"),
        ("index = 4\ncount = 4", "does not exist"),
        ('kind = "npz"\npath = "x"\nlabels = ["a", "a"]', "at least two names"),
        ('kind = "npz"\npath = "x"\nshape = [0, 2]', "positive numbers"),
        ('kind = "image_folder"\npath = "x"\nsize = [0, 2]', "positive numbers"),
        ('kind = "mqtt_stream"\ntopic = "a"\nlabel_topic = "a"\nfields = ["x"]', "the same"),
        ('kind = "mqtt_stream"\ntopic = "a/#"\nlabel_topic = "b"\nfields = ["x"]', "without"),
        ('kind = "mqtt_stream"\ntopic = "a"\nlabel_topic = "b"\nfields = ["x", "x"]', "each of them once"),
        ('kind = "floppy"', "kind"),
    ],
)
def test_what_is_wrong_is_named(toml: str, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        parse(toml)
