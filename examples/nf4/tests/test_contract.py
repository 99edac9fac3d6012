"""nf4 does what a cache expects of a strategy, in every mode."""

from cachequant.core.contract import parametrize_with_strategies

from cachequant_nf4 import NF4


@parametrize_with_strategies(NF4)
def test_contract(strategy, check):
    check(strategy)
