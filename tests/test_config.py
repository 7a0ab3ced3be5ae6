import pytest

from sptc.config import Config, ConfigError


def test_options_and_back():
    options = {
        "attention.density": 0.25,
        "attention.query_block": 32,
        "ffn.enabled": False,
        "decline": "never",
        "inductor": {"max_autotune": True},
    }
    config = Config.from_options(options)
    assert (config.attention_density, config.attention_query_block, config.ffn_enabled) == (0.25, 32, False)
    assert config.to_options() == options
    again = Config.from_options(config.to_options())
    assert again == config == Config.from_options(config) and again.given == config.given == options.keys()
    assert Config(ffn_blocks=4).to_options() == {"ffn.blocks": 4}
    assert Config.from_options(None) == Config() == Config.from_options({})


def test_an_option_given_as_its_default_is_known_to_be_given():
    config = Config.from_options({"ffn.blocks": 16})
    assert config == Config() and config.given == {"ffn.blocks"} and config.to_options() == {"ffn.blocks": 16}


@pytest.mark.parametrize("options", [{"given": frozenset()}, {"given": ["ffn.blocks"]}])
def test_given_is_no_option(options):
    with pytest.raises(ConfigError, match="unknown option 'given'"):
        Config.from_options(options)


@pytest.mark.parametrize(
    "options, context",
    [
        ({}, "auto"),
        ({"ffn.density": "auto"}, "auto"),
        ({"ffn.density": 1.0}, None),
        ({"ffn.density": 0.5, "ffn.context_density": "auto"}, "auto"),
        ({"ffn.density": 0.5, "ffn.context_density": 0.25}, 0.25),
        ({"ffn.context_density": None}, None),
    ],
)
def test_a_number_for_all_units_is_for_the_context_too(options, context):
    config = Config.from_options(options)
    assert config.context_density == context and Config.from_options(config.to_options()).context_density == context


def test_keep_can_be_turned_off():
    assert Config().ffn_keep == "loss"
    off = Config.from_options({"ffn.keep": None})
    assert off.ffn_keep is None and off.to_options() == {"ffn.keep": None}


def test_an_int_is_a_fine_density():
    density = Config.from_options({"ffn.density": 1}).ffn_density
    assert density == 1.0 and isinstance(density, float)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"ffn.block": 4}, "unknown option 'ffn.block'; did you mean 'ffn.blocks'"),
        ({"attention_density": 0.5}, "did you mean 'attention.density'"),
        ({3: 4}, "unknown option 3"),
        ({"ffn.blocks": 4.5}, "'ffn.blocks' must be int, got 4.5 (float)"),
        ({"ffn.blocks": True}, "'ffn.blocks' must be int, got True (bool)"),
        ({"ffn.density": "half"}, "'ffn.density' must be a number or 'auto', got 'half'"),
        ({"ffn.density": True}, "'ffn.density' must be a number or 'auto', got True"),
        ({"ffn.context_density": 2}, "'ffn.context_density' must be in (0, 1], got 2"),
        ({"ffn.enabled": 1}, "'ffn.enabled' must be bool, got 1 (int)"),
        ({"attention.query_block": "64"}, "must be int or None"),
        ({"attention.selector": "topk"}, "must be one of 'pq', 'pooled', got 'topk'"),
        ({"ffn.keep": "labels"}, "'ffn.keep' must be None or 'loss', got 'labels'"),
        ({"ffn.keep": True}, "'ffn.keep' must be None or 'loss', got True"),
        ({"decline": None}, "must be one of 'auto', 'never', got None"),
        ({"inductor": []}, "'inductor' must be dict"),
        ({"dump": 3}, "'dump' must be str or None"),
        ({"disable": "rewrite"}, "'disable' must be list or None"),
        ({"ffn.density": 0.0}, "'ffn.density' must be in (0, 1], got 0.0"),
        ({"attention.density": 1.01}, "'attention.density' must be in (0, 1]"),
        ({"ffn.density": float("nan")}, "must be in (0, 1]"),
        ({"attention.key_block": 0}, "'attention.key_block' must be at least 1"),
        ({"ffn.blocks": -8}, "'ffn.blocks' must be at least 1"),
        ([("ffn.blocks", 4)], "options must be a dict"),
    ],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(ConfigError) as error:
        Config.from_options(options)
    assert says in str(error.value)


@pytest.mark.parametrize("other", [{"ffn.density": 0.5}, {"ffn.context_density": 0.5}, {"ffn.selector": "router"}, {"plan": "plan.json"}])
def test_thin_gradients_belong_to_whole_forward_passes(other: dict[str, object]) -> None:
    Config.from_options({"ffn.gradient_density": 0.5, "max_rise": 0})
    with pytest.raises(ConfigError, match=r"'ffn.gradient_density' is for FFNs whose forward pass keeps all hidden units"):
        Config.from_options({"ffn.gradient_density": 0.5, **other})
