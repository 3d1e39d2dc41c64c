"""Peers of the benchmark: vLLM's own server starts only with known arguments."""

from __future__ import annotations

import warnings
from pathlib import Path

from loadtests.peers import openai_arguments


def test_vllms_own_server_takes_the_command_line_that_it_gets() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(openai_arguments(Path("a"), 16, 8000))
    assert parsed is not None
    assert (parsed.model, parsed.max_num_seqs, parsed.port, parsed.enforce_eager) == ("a", 16, 8000, True)
