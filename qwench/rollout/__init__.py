"""From prompts to scored groups: generate, grade, filter, and hand over one rollout at a time.

stream --take--> collect --groups--> groups --samples--> generate --requests--> engines
                    |                   |
                 filters             rewards
"""
