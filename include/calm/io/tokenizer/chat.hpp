// Chat prompts: messages written as the chat template of a model family asks for them.
//
// Not here: running Jinja templates. Three families are recognised by the marks that their templates write; any other
// template is refused, and so is one that writes dates, as those of Llama 3.1 and later do. The prompt ends where the
// assistant's answer begins. It has no BOS: encode adds that (EncodeOptions::add_special), and finds the marks in the
// text (parse_special). A default system message is found by chat_default_system.
#pragma once

#include <calm/core/text.hpp>
#include <calm/io/tokenizer/utf8.hpp>

#include <algorithm>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace calm::inline CALM_ABI {

enum class ChatFamily { chatml, gemma, llama3 };

struct ChatMessage {
  std::string role;  // "system" (only the first), "user" or "assistant"
  std::string content;
};

/// The system messages that ChatML templates put where the messages have none: SmolLM2's and those of Qwen 2.5, 2 and
/// 1.5.
inline constexpr std::string_view chat_default_systems[] = {
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "You are a helpful assistant.",
    "You are a helpful assistant"};

/// The one of them that a template has. Nothing for any other template.
inline std::optional<ChatMessage> chat_default_system(std::string_view chat_template) {
  for (const std::string_view words : chat_default_systems)
    if (chat_template.find(words) != std::string_view::npos) return ChatMessage{"system", std::string(words)};
  return {};
}

/// Calls fn(the words that a template itself writes behind a `mark` and the line's end, up to the end of the string or
/// a mark), for each of them.
inline void for_each_literal(std::string_view chat_template, std::string_view mark, const auto& fn) {
  for (std::size_t at = chat_template.find(mark); at != chat_template.npos; at = chat_template.find(mark, at)) {
    at += mark.size();
    const std::size_t end = std::min(chat_template.find_first_of("'\"{", at), chat_template.find("<|", at));
    std::string_view words = chat_template.substr(at, end - at);
    for (const std::string_view line_end : {"\\n", "\n"})
      if (words.starts_with(line_end)) words.remove_prefix(line_end.size());
    fn(words);
  }
}

/// Throws FormatError where a template has ChatML's marks and yet writes what chat_prompt does not.
inline void check_chatml(std::string_view chat_template, const std::string& where) {
  const auto refuse_if = [&](bool differs, std::string_view what, std::string_view words) {
    require<FormatError>(!differs, where, ": the chat template has the marks of ChatML, but also ", what, " ",
                         in_quotes(words),
                         ", which calm does not write; write the whole prompt yourself, marks and all");
  };
  constexpr std::string_view other_mark = "<|im_sep|>";
  refuse_if(chat_template.find(other_mark) != chat_template.npos, "the mark", other_mark);
  for_each_literal(chat_template, "<|im_start|>system", [&](std::string_view words) {
    const bool known =
        words.empty() || std::ranges::find(chat_default_systems, words) != std::end(chat_default_systems);
    refuse_if(!known, "a system message of its own,", words);
  });
  const std::size_t prompt = std::min(chat_template.find("add_generation_prompt"), chat_template.size());
  for_each_literal(chat_template.substr(prompt), "<|im_start|>assistant",
                   [&](std::string_view words) { refuse_if(!words.empty(), "a beginning of the answer,", words); });
}

/// The family of a chat template that the file `where` has. Throws FormatError where there is none, where it has the
/// marks of no family or of several, and where it writes dates, or beside ChatML's marks what that family does not.
inline ChatFamily chat_family_of(std::string_view chat_template, const std::string& where) {
  require<FormatError>(!chat_template.empty(), where,
                       ": has no chat template (of several, the one named \"default\" is ",
                       "read); write the whole prompt yourself, marks and all");
  const auto has = [&](std::string_view mark) { return chat_template.find(mark) != std::string_view::npos; };
  for (const std::string_view mark : {"strftime_now", "date_string", "Cutting Knowledge Date"})
    require<FormatError>(
        !has(mark), where, ": the chat template writes dates (it has ", in_quotes(mark),
        "), as Llama 3.1's and later ones do, and calm does not; write the whole prompt yourself, with system ",
        "message and marks");
  const bool chatml = has("<|im_start|>"), gemma = has("<start_of_turn>"), llama3 = has("<|start_header_id|>");
  require<FormatError>(chatml + gemma + llama3 == 1, where, ": the chat template ", in_quotes(chat_template),
                       chatml + gemma + llama3 == 0 ? " is of no known family: it has none"
                                                    : " could be of several families: it has more than one",
                       " of <|im_start|>, <start_of_turn> and <|start_header_id|>");
  if (chatml) check_chatml(chat_template, where);
  return chatml ? ChatFamily::chatml : gemma ? ChatFamily::gemma : ChatFamily::llama3;
}

/// "chatml", "gemma" or "llama3". Throws ConfigError for another name.
inline ChatFamily chat_family_named(std::string_view name) {
  if (name == "chatml") return ChatFamily::chatml;
  if (name == "gemma") return ChatFamily::gemma;
  if (name == "llama3") return ChatFamily::llama3;
  throw ConfigError(message("the chat family ", in_quotes(name), " is not known; chatml, gemma and llama3 are"));
}

/// The text without white space at its ends, as `| trim` gives it.
inline std::string_view trimmed(std::string_view text) {
  constexpr std::string_view spaces = " \t\n\v\f\r";
  const std::size_t begin = text.find_first_not_of(spaces);
  return begin == text.npos ? std::string_view() : text.substr(begin, text.find_last_not_of(spaces) + 1 - begin);
}

/// The prompt for the assistant's next message. Throws ConfigError for a role that is not known or a system message
/// that is not the first.
inline std::string chat_prompt(ChatFamily family, std::span<const ChatMessage> messages) {
  std::string prompt, before;  // before: what Gemma puts into the first message of the user
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const auto& [role, content] = messages[i];
    require<ConfigError>(role == "system" || role == "user" || role == "assistant", "message ", i, ": the role ",
                         in_quotes(role), " is not known; system, user and assistant are");
    require<ConfigError>(role != "system" || i == 0, "message ", i, ": only the first message can be the system's");
    switch (family) {
      case ChatFamily::chatml: prompt += "<|im_start|>" + role + '\n' + content + "<|im_end|>\n"; break;
      case ChatFamily::llama3:
        prompt += "<|start_header_id|>" + role + "<|end_header_id|>\n\n";
        prompt.append(trimmed(content)).append("<|eot_id|>");
        break;
      case ChatFamily::gemma:
        if (role == "system") {
          before = content + "\n\n";
          break;
        }
        prompt += "<start_of_turn>" + std::string(role == "assistant" ? "model" : "user") + '\n' + before;
        before.clear();
        prompt.append(trimmed(content)).append("<end_of_turn>\n");
        break;
    }
  }
  require<ConfigError>(before.empty(), "a system message of Gemma needs a message of the user after it");
  switch (family) {
    case ChatFamily::chatml: return prompt + "<|im_start|>assistant\n";
    case ChatFamily::llama3: return prompt + "<|start_header_id|>assistant<|end_header_id|>\n\n";
    default: return prompt + "<start_of_turn>model\n";
  }
}

}  // namespace calm::inline CALM_ABI
