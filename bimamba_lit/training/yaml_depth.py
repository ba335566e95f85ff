"""A bound on how deeply YAML is nested: libyaml builds a value by recursion in C, which ends the process if too deep.

Its events come one after the other, without recursion, so that they can be counted first.
"""

import yaml

_DEEPEST = 64  # levels; OmegaConf itself comes to about a hundred
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_depth(text: str) -> None:
    """Check that a value is not nested too deeply to be read.

    Raises:
        RecursionError: If it is.
        yaml.YAMLError: If the text is no YAML.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise RecursionError
    except yaml.YAMLError as error:
        if "nesting depth" in str(error):  # PyYAML's own bound, from 6.0.4 on, met by reading ahead
            raise RecursionError from error
        raise
