"""OpenAI's own client against headrace. Start `headrace serve smollm2`, then run this.

pip install openai
"""

import json

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id

print("-- streaming")
stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "What is a headrace?"}], stream=True,
    max_completion_tokens=60,
)  # fmt: skip
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)

print("\n-- an answer that fits a schema")
schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Invent a person."}],
    response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
)
print(json.loads(answer.choices[0].message.content))

print("-- a tool call")
tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 30}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the weather in Paris?"}],
    tools=[tool],
    tool_choice="required",
    parallel_tool_calls=False,
)
call = answer.choices[0].message.tool_calls[0].function
print(f"{call.name}({call.arguments})")

print("-- embeddings")
vectors = client.embeddings.create(model=model, input=["a small cat", "a little kitten", "a bank"])
cat, kitten, bank = (one.embedding for one in vectors.data)
for name, other in (("kitten", kitten), ("bank", bank)):
    print(f"cat · {name} = {sum(a * b for a, b in zip(cat, other, strict=True)):.3f}")
