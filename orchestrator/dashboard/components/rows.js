// A table whose rows are data: text, links, states, progress and times, all of it escaped by Vue.
export default {
  template: `
    <table class="rows" :class="{ cards }">
      <caption class="sr">{{ caption }}</caption>
      <thead>
        <tr>
          <th v-if="selectable" scope="col">
            <input type="checkbox" :checked="allPicked" @change="pickAll($event.target.checked)"
              aria-label="Select every job on this page" />
          </th>
          <th v-for="c in columns" :key="c.key" scope="col" :class="{ end: c.end }"
            :aria-sort="c.sort && sorted === c.sort ? (descending ? 'descending' : 'ascending') : undefined">
            <button v-if="c.sort" type="button" @click="$emit('sort', c.sort)">
              {{ c.label }}<span aria-hidden="true">{{ sorted === c.sort ? (descending ? '↓' : '↑') : '' }}</span>
            </button>
            <template v-else>{{ c.label }}</template>
          </th>
        </tr>
      </thead>
      <tbody>
        <tr v-for="row in rows" :key="row.id" :data-row="row.id">
          <td v-if="selectable" class="pick">
            <input type="checkbox" :checked="picked.includes(row.id)" @change="pick(row.id, $event.target.checked)"
              :aria-label="'Select ' + (row.name.text ?? row.name)" />
          </td>
          <td v-for="(c, i) in columns" :key="c.key" :data-label="c.label"
            :class="{ end: c.end, first: i === 0, none: isEmpty(row[c.key]) }">
            <template v-for="cell in [row[c.key] ?? '']">
              <template v-if="typeof cell === 'string'">{{ cell }}</template>
              <template v-else>
                <span v-if="cell.tone && !('pct' in cell)" class="chip" :class="cell.tone">{{ cell.text }}</span>
                <a v-else-if="cell.href" :href="cell.href" class="name">{{ cell.text }}</a>
                <time v-else-if="cell.ago" :datetime="cell.ago" data-ago :title="cell.ago">{{ ago(cell.ago) }}</time>
                <template v-else>{{ cell.text }}</template>
                <div v-if="'pct' in cell" class="meter" :class="cell.tone" role="progressbar" aria-valuemin="0"
                  aria-valuemax="100" :aria-valuenow="cell.pct" :aria-label="cell.label"
                ><span :style="{ width: cell.pct + '%' }"></span></div>
                <span v-if="cell.sub" class="sub">{{ cell.sub }}</span>
                <button v-if="cell.action" type="button" class="btn" :class="cell.look"
                  :aria-label="cell.label" @click="$emit('act', { id: row.id, action: cell.action })">{{ cell.button }}</button>
              </template>
            </template>
          </td>
        </tr>
      </tbody>
    </table>`,
  props: {
    caption: String,
    columns: Array,
    rows: Array,
    selectable: Boolean,
    cards: Boolean,
    sorted: String,
    descending: Boolean,
  },
  data: () => ({ picked: [] }),
  computed: {
    allPicked() {
      return this.rows.length > 0 && this.rows.every((row) => this.picked.includes(row.id));
    },
  },
  methods: {
    ago: (iso) => window.pw.ago(iso),
    isEmpty: (cell) => cell === undefined || cell === "" || (typeof cell === "object" && cell.text === "" && !cell.action),
    pick(id, on) {
      this.picked = on ? [...this.picked, id] : this.picked.filter((other) => other !== id);
      this.$emit("pick", this.picked);
    },
    pickAll(on) {
      this.picked = on ? this.rows.map((row) => row.id) : [];
      this.$emit("pick", this.picked);
    },
    unpick() {
      this.picked = [];
    },
  },
};
