// Conflicts of a warp's accesses over the 32 banks of shared memory, for code in which all lanes do the same.
#pragma once

#include "machine.h"

namespace cmx::emulator {

// The nth accesses of the lanes of a warp are one instruction. It serves 128 bytes a cycle: eight lanes with 16 bytes each,
// and so on; a cycle more for every further word that they want of one bank.
inline int conflicts_of(const std::vector<Access>& lanes) {
  int conflicts = 0;
  const size_t at_once = lanes.empty() ? 1 : std::max<size_t>(1, 128 / std::max(4u, lanes[0].bytes));
  for (size_t first = 0; first < lanes.size(); first += at_once) {
    std::vector<uint32_t> words[32];  // that are wanted of a bank
    size_t most = 1;
    for (size_t i = first; i < std::min(lanes.size(), first + at_once); ++i)
      for (uint32_t word = lanes[i].at / 4; 4 * word < lanes[i].at + lanes[i].bytes; ++word) {
        auto& bank = words[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        most = std::max(most, bank.size());
      }
    conflicts += static_cast<int>(most) - 1;
  }
  return conflicts;
}

// Of the block that has just ended
inline void count_bank_use() {
  for (int first = 0; first < machine.count; first += 32) {
    size_t next[32] = {};
    for (size_t phase = 0, done = 0; done < 32; ++phase) {
      if (machine.bank_use.size() <= phase) machine.bank_use.push_back({});
      while (true) {
        std::vector<Access> lanes;
        for (int lane = 0; lane < 32 && first + lane < machine.count; ++lane) {
          const auto& all = machine.threads[first + lane].accesses;
          if (next[lane] < all.size() && all[next[lane]].bytes) lanes.push_back(all[next[lane]++]);
        }
        if (lanes.empty()) break;
        ++machine.bank_use[phase].accesses;
        machine.bank_use[phase].conflicts += conflicts_of(lanes);
      }
      done = 0;
      for (int lane = 0; lane < 32; ++lane) {
        const bool exists = first + lane < machine.count;
        if (!exists || ++next[lane] >= machine.threads[first + lane].accesses.size()) ++done;
      }
    }
  }
}

}  // namespace cmx::emulator
