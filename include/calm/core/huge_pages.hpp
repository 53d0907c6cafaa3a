// Huge pages: memory that is read again and again is mapped in pages of 2 MB where the system has them, so that a
// processor finds where it lies without walking tables for every 4 kB.
//
// Source: madvise(2), MADV_HUGEPAGE.
#pragma once

#include <calm/core/config.hpp>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

namespace calm::inline CALM_ABI {

inline constexpr std::size_t huge_page_bytes = std::size_t{2} << 20;

/// Asks the system for huge pages in [p, p + bytes), as far as whole ones lie in it. A system may refuse: then nothing
/// changes.
inline void ask_for_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto begin = (reinterpret_cast<std::uintptr_t>(p) + huge_page_bytes - 1) / huge_page_bytes * huge_page_bytes;
  const auto end = (reinterpret_cast<std::uintptr_t>(p) + bytes) / huge_page_bytes * huge_page_bytes;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

/// `bytes` at an address that 64 divides, in pieces of huge pages that neighbours share: for packed weights, most of
/// which are smaller than one. A piece is given back when nothing in it is held any more. Safe to call from several
/// threads.
[[gnu::cold, gnu::noinline]] inline std::shared_ptr<std::byte> allocate_in_huge_pages(std::size_t bytes) {
  static constexpr std::size_t small = std::size_t{64} << 10, piece = 8 * huge_page_bytes, line = 64;
  const auto allocate = [](std::size_t size, std::size_t alignment) {
    const std::align_val_t align{alignment};
    const auto release = [align](std::byte* p) { ::operator delete(p, align); };
    return std::shared_ptr<std::byte>(static_cast<std::byte*>(::operator new(size, align)), release);
  };
  if (bytes < small) return allocate(bytes, line);  // a tool that watches memory sees where it ends
  const auto huge = [&](std::size_t size) {
    auto memory = allocate(size, huge_page_bytes);
    ask_for_huge_pages(memory.get(), size);
    return memory;
  };
  if (bytes >= piece) return huge((bytes + huge_page_bytes - 1) / huge_page_bytes * huge_page_bytes);
  static std::mutex mutex;
  static std::weak_ptr<std::byte> current;  // the piece from which the last came
  static std::size_t used = 0;
  const std::lock_guard lock(mutex);
  auto memory = current.lock();
  if (!memory || used + bytes > piece) current = memory = huge(piece), used = 0;
  std::byte* const begin = memory.get() + used;
  used += (bytes + line - 1) / line * line;
  return {std::move(memory), begin};
}

}  // namespace calm::inline CALM_ABI
