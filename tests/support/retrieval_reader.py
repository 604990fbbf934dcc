"""Answers prompts of retrieval tasks from their text alone, as a perfect model would."""

import re


def right_values(prompt: str) -> list[str]:
    """Returns the values that the question at the end of a prompt asks for, as the text gives them."""
    question = re.findall(r"^ ?(W[^\n?]*)\?", prompt, re.MULTILINE)[-1]
    if number := re.search(r"variables have the value (\d+)", question):
        lines = re.findall(r"^ ?([A-Z]{3}) = (\w+)$", prompt, re.MULTILINE)
        values: dict[str, str] = {}
        for name, value in lines:  # a variable has its value before it is copied
            values[name] = values.get(value, value)
        return [name for name, value in values.items() if value == number[1]]
    lines = re.findall(r"pass key of (\w+) is (\d+)\.", prompt)
    if lines:
        asked = [word for word in re.findall(r"\w+", question) if word in dict(lines)]
        return [number for word in asked for name, number in lines if name == word]
    return re.findall(r"The pass key is (\d+)\.", prompt)
